"""Checks whether tokens of a dtype given by the user look like tokens of a wider one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.source import ReadOptions, token_dtype
from pdl_ext.storage.place import Place

__all__ = ["BLOCK_BYTES", "block_starts", "doubt_of_width"]

BLOCK_BYTES = 4096
_BLOCKS = 4
_WIDER = {2: "uint16", 4: "uint32 or int32", 8: "int64"}
_LEAST_NEIGHBOURS = 32
_SHARE_OF_IDS = 0.99


def block_starts(size: int) -> list[int]:
    """The positions of the sample's blocks in a number of bytes, each a multiple of the widest dtype."""
    last = max(0, size - BLOCK_BYTES)
    return sorted({last * block // (_BLOCKS - 1) // 8 * 8 for block in range(_BLOCKS)})


def doubt_of_width(
    path: Place, dtype: str, blocks: Sequence[NDArray[np.uint8]], sizes: Sequence[int], options: ReadOptions
) -> str | None:
    """A warning that names a file whose tokens seem to have a wider dtype than the given one.

    blocks: a sample of their bytes, each from the beginning of a token on. sizes: the bytes of the sequences that
    contain the blocks.
    """
    itemsize = token_dtype(dtype).itemsize
    for width, names in _WIDER.items():
        if width > itemsize and not any(size % width for size in sizes) and _are_ids(blocks, width, itemsize, options):
            times = width // itemsize
            return (
                f"{path}: got dtype {dtype}, expected {names}: its bytes then are ids of the vocabulary, while as "
                f"{dtype}, {times - 1} of {times} ids would be 0"
            )
    return None


def _are_ids(blocks: Sequence[NDArray[np.uint8]], width: int, itemsize: int, options: ReadOptions) -> bool:
    """Whether bytes are ids of the vocabulary in `width` bytes, and hardly can be ids in `itemsize` bytes."""
    # Two or more narrow ids form a wide one, which is below V only if the last of them is 0 or almost. Padding with 0
    # or -1 has this property in every width, and is ignored. All of the rest must be ids, except for a few out of
    # range. Narrow ids that are often 0 fail here: 0 comes first in a group as often as last. Two further conditions
    # are for data of little else. The first is for small ids, where the first may be as small as the last. The second
    # is for single ids between padding. Ids up to 2 V are accepted, since padding may be the first id above the
    # vocabulary.
    number = ids = clear = neighbours = 0
    vocab_size, ignore_index = options.vocab_size, options.policy.ignore_index
    limit = 2 * vocab_size
    largest_top = (limit - 1) >> 8 * (width - itemsize)
    for block in blocks:
        wide = block[: block.size // width * width].view(f"<u{width}")
        is_some = (wide != 0) & (wide != 2 ** (8 * width) - 1)
        is_id = is_some & ((wide < limit) | (wide == ignore_index % 2 ** (8 * width)))
        number += int(is_some.sum())
        ids += int(is_id.sum())
        clear += int((is_id & (wide % 2 ** (8 * itemsize) > largest_top)).sum())
        neighbours += int((is_id[1:] & is_id[:-1]).sum())
    return neighbours >= _LEAST_NEIGHBOURS and ids >= _SHARE_OF_IDS * number and 2 * clear >= number
