"""A tensor without its zeros: the values kept, in flat order, and a code of where they go.

Zero is an element whose bits are all zero, so elements are looked at as unsigned integers of their size: -0.0, NaN and
every other pattern come back as they were, whatever the dtype. Work goes in blocks that stay in the processor's cache.
"""

from collections.abc import Iterator

import numpy as np
import torch


BLOCK = 1 << 18  # elements; a multiple of 8

# Below this density groups of four without a mark are dropped before marks are looked for.
FEW_MARKS = 0.15

# torch has no operations on most unsigned integers; bits are the same.
_SIGNED = {1: np.dtype("u1"), 2: np.dtype("i2"), 4: np.dtype("i4"), 8: np.dtype("i8")}


def kept_blocks(elements: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Fill `values` with the elements that are not zero, block by block.

    Args:
        elements: 1-D, unsigned integers.
        values: as many elements of the same dtype as are not zero.

    Yields:
        Of each block its first index and its flags (bool, True = kept; only good until the next block).
    """
    flags = np.empty(min(BLOCK, len(elements)), bool)
    kept = 0
    for start in range(0, len(elements), BLOCK):
        block = elements[start : start + BLOCK]
        marks = np.not_equal(block, 0, out=flags[: len(block)])
        kept += _take(block, marked_positions(marks), values[kept:])
        yield start, marks


def kept_indices(elements: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """As `kept_blocks`, but with the indices of what is kept instead of flags, counted from the first of the block."""
    kept, group = 0, 8 // elements.itemsize  # elements in eight bytes
    for start in range(0, len(elements), BLOCK):
        block = elements[start : start + BLOCK]
        if group < 4 or len(block) % group or len(values) > FEW_MARKS * len(elements):
            indices = marked_positions(block != 0)
            kept += _take(block, indices, values[kept:])
        else:
            some, few = _without_empty(block.view(np.uint64))
            few = few.view(elements.dtype)
            within = (few != 0).nonzero()[0]
            kept += _take(few, within, values[kept:])
            indices = _whole_positions(some, within, group)
        yield start, indices


def compress_bitmask(elements: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The elements that are not zero, and one bit per element: element `i` is bit `i % 8` of byte `i // 8`.

    Args:
        elements: 1-D, unsigned integers.
        count: how many of them are not zero.

    Returns:
        `count` values; uint8 of ceil(n / 8) bytes, spare bits zero.
    """
    values = np.empty(count, elements.dtype)
    bits = np.empty(-(-len(elements) // 8), np.uint8)
    for start, flags in kept_blocks(elements, values):
        bits[start // 8 : (start + len(flags) + 7) // 8] = np.packbits(flags, bitorder="little")
    return values, bits


def expand_bitmask(values: np.ndarray, bits: np.ndarray, out: np.ndarray) -> None:
    """Undo `compress_bitmask` into `out`, n zeros of the dtype of `values`.

    Raises:
        ValueError: the bits do not say as many as there are values, or a spare bit is set.
    """
    used, target, source = 0, for_scatter(out), for_scatter(values)
    for start in range(0, len(out), BLOCK):
        size = min(BLOCK, len(out) - start)
        coded = bits[start // 8 : (start + size + 7) // 8]
        if size % 8 and int(coded[-1]) >> (size % 8):
            raise ValueError("a spare bit of the bitmask is set")
        positions = marked_positions(np.unpackbits(coded, count=size, bitorder="little").view(bool))
        if used + len(positions) > len(values):
            raise ValueError(f"the bitmask marks more than the {len(values)} values that are there")
        scatter(target[start : start + size], positions, source[used : used + len(positions)])
        used += len(positions)
    if used != len(values):
        raise ValueError(f"the bitmask marks {used} of the {len(values)} values that are there")


def marked_positions(flags: np.ndarray) -> np.ndarray:
    """The indices (int64) where the 1-D bool array is True."""
    if len(flags) % 4 or np.count_nonzero(flags) > FEW_MARKS * len(flags):
        return flags.nonzero()[0]
    # The search takes as long for every False as for a True, and where marks are rare longer; so drop groups without.
    some, groups = _without_empty(flags.view(np.uint32))
    return _whole_positions(some, groups.view(bool).nonzero()[0], 4)


def _take(elements: np.ndarray, positions: np.ndarray, out: np.ndarray) -> int:
    """Copy the elements at these positions to the beginning of `out`; returns how many."""
    elements.take(positions, out=out[: len(positions)], mode="wrap")  # "raise" would buffer
    return len(positions)


def _without_empty(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the integers that are not zero, and these."""
    some = (groups != 0).nonzero()[0]
    return some, groups.take(some, mode="wrap")


def _whole_positions(some: np.ndarray, within: np.ndarray, group: int) -> np.ndarray:
    """Where positions within the groups `some`, of 4 or 8 elements, are among all groups; overwrites both."""
    some *= group
    positions = some.take(within >> (group.bit_length() - 1), mode="wrap")
    within &= group - 1
    positions |= within
    return positions


def for_scatter(elements: np.ndarray) -> torch.Tensor:
    """The same memory as `scatter` takes it; a copy where it must not be written."""
    signed = elements.view(_SIGNED[elements.itemsize])
    return torch.from_numpy(signed if signed.flags.writeable else signed.copy())  # or torch would warn


def scatter(out: torch.Tensor, indices: np.ndarray, values: torch.Tensor) -> None:
    """`out[indices] = values`, for which torch takes a third of numpy's time.

    Args:
        out: of `for_scatter`, or a slice of that.
        indices: int64.
        values: as many, also of `for_scatter`.

    Raises:
        RuntimeError: an index is below 0 or beyond the end.
    """
    out.scatter_(0, torch.from_numpy(indices), values)
