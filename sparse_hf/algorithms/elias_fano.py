"""Where few of many weights are kept: their indices in little more than the entropy of the mask.

Elias-Fano: of each index the `low_bits` lowest bits are stored as they are, in bit planes; the rest never falls from
one index to the next and is stored in unary: for the i-th index (from 0) with high part h, bit h + i of a bitmap is
set. At 90 to 95 % sparsity this takes 9 to 12 % more than the entropy of the mask, and is read without a loop over
bits.
"""

import numpy as np
import torch

from sparse_hf.algorithms.nonzeros import (
    BLOCK,
    NOTHING,
    are_few,
    for_scatter,
    kept_blocks,
    marked_positions,
    ramp,
    scatter,
)


# A longer low part would save nothing worth having, and this bounds how much a small file can claim to be: the bitmap
# has at least a bit for 32 elements.
MOST_LOW_BITS = 5


def low_bits(size: int, count: int) -> int:
    """How many low bits make the code shortest for `count` of `size` elements: 0 to 5, the fewest among equals."""
    return min(range(MOST_LOW_BITS + 1), key=lambda width: width * count + (size >> width))


def code_bytes(size: int, count: int) -> int:
    """The length of the code in bytes."""
    width = low_bits(size, count)
    return width * _plane_bytes(count) + -(-_unary_bits(size, count, width) // 8)


def compress_elias_fano(elements: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The elements that are not zero, and the code of their indices.

    Args:
        elements: 1-D, unsigned integers.
        count: about how many of them are not zero; if that misleads, the work is done twice.

    Returns:
        The values, in pieces; uint8 of `code_bytes(n, values)` bytes: bit planes of the low parts, lowest first, each
        of ceil(values / 8) bytes, then the unary bitmap. Lowest bit first, spare bits zero.
    """
    width = low_bits(len(elements), count)
    values, lows, unaries, done = [], [NOTHING], [NOTHING], 0
    ones = torch.ones(BLOCK, dtype=torch.uint8, device="cpu")  # whatever the default device is
    for block in kept_blocks(elements, are_few(count, len(elements))):
        kept = len(block.values)
        values.append(block.values)
        lows.append(block.positions.astype(np.uint8))  # the lowest eight bits, of which `width` count
        places = block.positions.astype(np.int64, copy=False)
        places >>= width  # as each block begins at a multiple of 1 << width
        places += ramp(kept)
        unaries.append(np.zeros(kept + (block.size >> width), np.uint8))
        scatter(for_scatter(unaries[-1]), places, ones[:kept])
        done += kept
    if low_bits(len(elements), done) != width:
        return compress_elias_fano(elements, done)
    low, unary = np.concatenate(lows), np.concatenate(unaries)[: _unary_bits(len(elements), done, width)]
    planes = [np.packbits(low & (1 << plane), bitorder="little") for plane in range(width)]
    return values, np.concatenate([*planes, np.packbits(unary, bitorder="little")])


def expand_elias_fano(values: np.ndarray, code: np.ndarray, out: np.ndarray) -> None:
    """Undo `compress_elias_fano` into `out`, n elements of the dtype of `values`, whatever they are.

    Raises:
        ValueError: the code does not say as many indices as there are values, or one that is repeated, falls or is
            not below n, or a spare bit is set.
    """
    count, width = len(values), low_bits(len(out), len(values))
    plane_bytes = _plane_bytes(count)
    planes, unary = code[: width * plane_bytes].reshape(width, plane_bytes), code[width * plane_bytes :]
    _check_spare_bits(planes, unary, count, _unary_bits(len(out), count, width))
    done, last, few = 0, -1, are_few(count, 8 * len(unary))
    target, source = for_scatter(out), for_scatter(values)
    for start in range(0, len(unary), BLOCK // 8):
        flags = np.unpackbits(unary[start : start + BLOCK // 8], bitorder="little").view(bool)
        indices = marked_positions(flags, few)
        end = done + len(indices)
        if end > count:
            raise ValueError(f"the code says more indices than the {count} values that are there")
        if done == end:
            continue
        first = (8 * start - done) << width  # what the clear bits before this block come to
        indices -= ramp(len(indices))
        if width:
            indices <<= width
            indices |= _low_parts(planes, done, end)
        if first + indices[0] <= last or first + indices[-1] >= len(out) or (indices[1:] <= indices[:-1]).any():
            raise ValueError(f"the code says indices that do not rise or are not below {len(out)}")
        out[last + 1 : first + indices[-1] + 1] = 0
        scatter(target[first:], indices, source[done:end])
        done, last = end, first + indices[-1]
    if done != count:
        raise ValueError(f"the code says {done} indices for {count} values")
    out[last + 1 :] = 0


def _low_parts(planes: np.ndarray, first: int, end: int) -> np.ndarray:
    """uint8: the low parts of indices `first` to `end`, of at least one plane."""
    byte, skipped = divmod(first, 8)
    parts = None
    for plane in planes[::-1, byte : (end + 7) // 8]:
        bits = np.unpackbits(plane, bitorder="little")
        parts = bits if parts is None else np.add(np.add(parts, parts, out=parts), bits, out=parts)
    return parts[skipped : skipped + end - first]


def _check_spare_bits(planes: np.ndarray, unary: np.ndarray, count: int, unary_bits: int) -> None:
    ends = [*planes[:, -1:].ravel().tolist()] if count % 8 else []
    if any(end >> (count % 8) for end in ends) or (unary_bits % 8 and int(unary[-1]) >> (unary_bits % 8)):
        raise ValueError("a spare bit of the code is set")


def _plane_bytes(count: int) -> int:
    return -(-count // 8)


def _unary_bits(size: int, count: int, width: int) -> int:
    """One set bit per index, one clear bit for each rise of the high part."""
    return count + (max(size, 1) - 1 >> width)
