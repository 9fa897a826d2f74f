"""A tensor without its zeros: the values kept, in flat order, and a code of where they go.

Zero is an element whose bits are all zero, so elements are looked at as unsigned integers of their size: -0.0, NaN and
every other pattern come back as they were, whatever the dtype. Work goes in blocks that stay in the processor's cache.
Where `compiled_loops` can do it they do; the results are the same.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from sparse_hf.algorithms.compiled_loops import MULTIPLE, CompiledLoops, KeptBlock, compiled_loops


BLOCK = 1 << 18  # elements; a multiple of 8

# Below this density groups of four flags without a mark are dropped before marks are looked for.
FEW_MARKS = 0.09

# Compiling loops takes as long as numpy does for twenty million elements, so a model of smaller tensors does without.
WORTH_COMPILING = 1 << 18  # elements of a tensor

# numpy's search takes twice as long where a tenth or fewer are marked, so as many marks are added to a block.
ADDED_MARKS = 1 << 12

NOTHING = np.empty(0, np.uint8)  # so that there is something to concatenate

# torch has no operations on most unsigned integers; bits are the same.
_SIGNED = {1: np.dtype("u1"), 2: np.dtype("i2"), 4: np.dtype("i4"), 8: np.dtype("i8")}


def kept_blocks(elements: np.ndarray, few: bool) -> Iterator[KeptBlock]:
    """The elements that are not zero, block by block.

    Args:
        elements: 1-D, unsigned integers.
        few: as in `marked_positions`.
    """
    loops, whole = loops_for(len(elements), elements.itemsize), 0
    if loops and (loops.by_vectors or not few):  # numpy passes over few marks faster than a loop over elements
        whole = len(elements) // MULTIPLE * MULTIPLE
        yield from loops.pack(elements[:whole])
    yield from _found_by_numpy(elements[whole:], few)


def loops_for(size: int, itemsize: int) -> CompiledLoops | None:
    """Compiled loops for a tensor of `size` elements, where there are any and they are worth it."""
    return compiled_loops(itemsize) if size >= WORTH_COMPILING else None


def _found_by_numpy(elements: np.ndarray, few: bool) -> Iterator[KeptBlock]:
    flags = np.empty(min(len(elements), BLOCK) + ADDED_MARKS, bool)
    for start in range(0, len(elements), BLOCK):
        block = elements[start : start + BLOCK]
        marks = np.not_equal(block, 0, out=flags[: len(block)])
        if few:
            positions = marked_positions(marks, few)
        else:
            flags[len(block) : len(block) + ADDED_MARKS] = True
            positions = flags[: len(block) + ADDED_MARKS].nonzero()[0][:-ADDED_MARKS]
        values = block.take(positions, mode="wrap")  # "raise" would buffer
        yield KeptBlock(len(block), np.packbits(marks, bitorder="little"), positions, values)


def compress_bitmask(elements: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The elements that are not zero, and one bit per element: element `i` is bit `i % 8` of byte `i // 8`.

    Args:
        elements: 1-D, unsigned integers.
        count: about how many of them are not zero.

    Returns:
        The values, in pieces; uint8 of ceil(n / 8) bytes, spare bits zero.
    """
    values, bits = [], [NOTHING]
    for block in kept_blocks(elements, are_few(count, len(elements))):
        bits.append(block.bits)
        values.append(block.values)
    return values, np.concatenate(bits)


def expand_bitmask(values: np.ndarray, bits: np.ndarray, out: np.ndarray) -> None:
    """Undo `compress_bitmask` into `out`, n elements of the dtype of `values`, whatever they are.

    Raises:
        ValueError: the bits do not say as many as there are values, or a spare bit is set.
    """
    loops, whole, used = loops_for(len(out), out.itemsize), 0, 0
    if loops:
        whole = len(out) // MULTIPLE * MULTIPLE
        used = loops.unpack(values, bits, out[:whole])
        if used is None:
            raise _too_many(len(values))
    used += _expanded_by_numpy(values[used:], bits[whole // 8 :], out[whole:])
    if used != len(values):
        raise ValueError(f"the bitmask marks {used} of the {len(values)} values that are there")


def _expanded_by_numpy(values: np.ndarray, bits: np.ndarray, out: np.ndarray) -> int:
    """How many values were used."""
    used, target, source = 0, for_scatter(out), for_scatter(values)
    few = are_few(len(values), len(out))
    for start in range(0, len(out), BLOCK):
        size = min(BLOCK, len(out) - start)
        coded = bits[start // 8 : (start + size + 7) // 8]
        if size % 8 and int(coded[-1]) >> (size % 8):
            raise ValueError("a spare bit of the bitmask is set")
        positions = marked_positions(np.unpackbits(coded, count=size, bitorder="little").view(bool), few)
        if used + len(positions) > len(values):
            raise _too_many(len(values))
        out[start : start + size] = 0  # just before it is needed, which is faster than all at once
        scatter(target[start : start + size], positions, source[used : used + len(positions)])
        used += len(positions)
    return used


def _too_many(count: int) -> ValueError:
    return ValueError(f"the bitmask marks more than the {count} values that are there")


def are_few(count: int, size: int) -> bool:
    """Whether `marked_positions` is faster with `few`, for `count` marks among `size` flags."""
    return count < FEW_MARKS * size


def marked_positions(flags: np.ndarray, few: bool) -> np.ndarray:
    """The indices (int64) where the 1-D bool array is True, found faster with `few` if `are_few` says so."""
    if not few or len(flags) % 4:
        return flags.nonzero()[0]
    # The search takes as long for every False as for a True, and where marks are rare longer; so drop groups without.
    groups = flags.view(np.uint32)
    some = (groups != 0).nonzero()[0]
    positions = groups.take(some, mode="wrap").view(bool).nonzero()[0]
    some -= ramp(len(some))  # how many groups were dropped before each
    some <<= 2
    positions += some.take(positions >> 2, mode="wrap")
    return positions


def ramp(length: int) -> np.ndarray:
    """0, 1, 2, ..., at most a block; not to be written."""
    return _whole_ramp()[:length]


@functools.cache
def _whole_ramp() -> np.ndarray:
    return np.arange(BLOCK)  # made once, as that takes longer than using it


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
