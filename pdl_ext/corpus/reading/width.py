"""Whether tokens whose dtype the user gave look like those of a wider one."""

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
    """Where the blocks of a sample begin in so many bytes, each at a multiple of the widest dtype."""
    last = max(0, size - BLOCK_BYTES)
    return sorted({last * block // (_BLOCKS - 1) // 8 * 8 for block in range(_BLOCKS)})


def doubt_of_width(
    path: Place, dtype: str, blocks: Sequence[NDArray[np.uint8]], sizes: Sequence[int], options: ReadOptions
) -> str | None:
    """A warning that names a file whose tokens seem to be of a dtype wider than the one that was given.

    blocks: a sample of their bytes, each from the beginning of a token on; sizes: of the sequences that the blocks are
    of, in bytes.
    """
    itemsize = token_dtype(dtype).itemsize
    for width, names in _WIDER.items():
        if width > itemsize and not any(size % width for size in sizes) and _are_ids(blocks, width, itemsize, options):
            times = width // itemsize
            return (
                f"{path}: got dtype {dtype}, expected {names}, as which its bytes are ids of the vocabulary: as "
                f"{dtype}, {times - 1} of {times} ids would be 0"
            )
    return None


def _are_ids(blocks: Sequence[NDArray[np.uint8]], width: int, itemsize: int, options: ReadOptions) -> bool:
    """Whether bytes are ids of the vocabulary in `width` bytes, and can hardly be ids in `itemsize` bytes."""
    # Two or more narrow ids make a wide one, which is below V only if the last of them is 0 or nearly so. Padding with
    # 0 or -1 is that in every width, and tells nothing. All of the rest must be ids, but for a few out of range. Narrow
    # ids that are often 0 fail here: 0 comes first in a group as often as last. Two conditions more are for data of
    # little else: small ids, of which the first is no larger than the last may be, and single ids amid padding. Ids up
    # to 2 V are some, since padding may be the first id behind the vocabulary.
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
