"""A tensor without its zeros: the values kept, in flat order, and a code of where they go.

Zero is an element whose bits are all zero, so elements are looked at as unsigned integers of their size: -0.0, NaN and
every other pattern come back as they were, whatever the dtype. Work goes in blocks that stay in the processor's cache.
"""

from collections.abc import Iterator

import numpy as np


BLOCK = 1 << 16  # elements; a multiple of 8


def kept_blocks(elements: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Fill `values` with the elements that are not zero, block by block.

    Args:
        elements: 1-D, unsigned integers.
        values: as many elements of the same dtype as are not zero.

    Yields:
        Of each block its first index, its flags (bool, True = kept; only good until the next block) and the indices
        of what is kept, counted from its first.
    """
    flags = np.empty(min(BLOCK, len(elements)), bool)
    kept = 0
    for start in range(0, len(elements), BLOCK):
        block = elements[start : start + BLOCK]
        marks = np.not_equal(block, 0, out=flags[: len(block)])
        positions = marked_positions(marks)
        block.take(positions, out=values[kept : kept + len(positions)], mode="clip")  # "raise" would buffer
        kept += len(positions)
        yield start, marks, positions


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
    for start, flags, _ in kept_blocks(elements, values):
        bits[start // 8 : (start + len(flags) + 7) // 8] = np.packbits(flags, bitorder="little")
    return values, bits


def expand_bitmask(values: np.ndarray, bits: np.ndarray, out: np.ndarray) -> None:
    """Undo `compress_bitmask` into `out`, n zeros of the dtype of `values`.

    Raises:
        ValueError: the bits do not say as many as there are values, or a spare bit is set.
    """
    used = 0
    for start in range(0, len(out), BLOCK):
        block = out[start : start + BLOCK]
        coded = bits[start // 8 : (start + len(block) + 7) // 8]
        if len(block) % 8 and int(coded[-1]) >> (len(block) % 8):
            raise ValueError("a spare bit of the bitmask is set")
        positions = marked_positions(np.unpackbits(coded, count=len(block), bitorder="little").view(bool))
        if used + len(positions) > len(values):
            raise ValueError(f"the bitmask marks more than the {len(values)} values that are there")
        block[positions] = values[used : used + len(positions)]
        used += len(positions)
    if used != len(values):
        raise ValueError(f"the bitmask marks {used} of the {len(values)} values that are there")


def marked_positions(flags: np.ndarray) -> np.ndarray:
    """The indices (int64) where the 1-D bool array is True."""
    if len(flags) % 8 or 8 * np.count_nonzero(flags) > len(flags):
        return np.flatnonzero(flags)
    # Where most are False, numpy's search is led astray by every True; so drop words of eight False at once.
    words = flags.view(np.uint64)
    some = np.flatnonzero(words != 0)
    within = np.flatnonzero(words.take(some).view(bool))
    positions = some.take(within >> 3)
    positions <<= 3
    within &= 7
    positions |= within
    return positions
