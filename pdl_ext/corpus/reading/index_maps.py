"""Files of trainers beside their tokens that look like tokens: the order of documents and samples."""

from __future__ import annotations

import re

from pdl_ext.storage.place import Place

__all__ = ["is_index_map"]

_INDEX_MAP = re.compile(
    # Older Megatron, GPT-NeoX and NeMo, beside the data.
    r".*_(doc|sample|shuffle|decoder_packed_batch)_idx\.npy"
    r"|.*_indexmap_.*\.npy"
    # Megatron-DeepSpeed and Megatron's core, in a cache: the name has a hash of the description.
    r"|[0-9a-f]{32}(_sample)?_index\.npy"
    r"|[0-9a-f]{32}-.+_index\.npy"
    r"|[0-9a-f]{32}-.+-description\.txt"
    r"|[0-9a-f]{32}\.dsc"
)
# fairseq's, with the tokens' index beside it.
_OF_FAIRSEQ = re.compile(r"dict(\.[\w-]+)?\.txt|preprocess\.log")


def is_index_map(path: Place) -> bool:
    """Whether a file's name shows that it was made from tokens, by a trainer or a tokenizer, and holds none."""
    if _OF_FAIRSEQ.fullmatch(path.name):
        return any(path.parent.glob("*.idx"))
    return _INDEX_MAP.fullmatch(path.name) is not None
