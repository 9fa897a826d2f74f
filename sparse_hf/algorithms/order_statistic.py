"""The k-th largest of values that are spread over blocks and ranks, without ever putting them together.

A radix select: floats become integers of the same order, and each pass counts one 16-bit digit. Only counts travel.
`all_reduce_sum` is that of `ShardLayout`; every function is called by all ranks together, with the same result.
numpy rather than torch: these are many short operations, on which torch's threads lose more time than they save.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


DIGIT_BITS = 16
PROBES = 1 << 10

_INTEGER_OF = {np.dtype(np.float32): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.int64)}


def kth_largest(
    blocks: Callable[[], Iterable[np.ndarray]], k: int, dtype: np.dtype, all_reduce_sum: Callable[[Tensor], Tensor]
) -> float:
    """The k-th largest value in the blocks of all ranks, exactly.

    Args:
        blocks: returns an iterable over this rank's 1-D arrays; called once per digit, so that they can be made on
            the fly instead of stored.
        k: 1-based rank, 1 = the largest; at most the number of values on all ranks.
        dtype: of the values, fp32 (2 all-reduces of 512 KiB) or fp64 (4).
    """
    bits = 8 * dtype.itemsize
    half = 1 << (DIGIT_BITS - 1)
    prefix = 0
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        is_top = shift == bits - DIGIT_BITS
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for values in blocks():
            keys = ordered_keys(values)
            if is_top:
                digits = (keys >> shift) + half  # signed: puts the negative numbers first
            else:
                keys = keys[(keys >> (shift + DIGIT_BITS)) == prefix]
                digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            counts += np.bincount(digits, minlength=1 << DIGIT_BITS)
        from_the_top = _reduced(counts, all_reduce_sum)[::-1].cumsum()
        bins_above = int(np.searchsorted(from_the_top, k))
        if bins_above:
            k -= int(from_the_top[bins_above - 1])
        digit = (1 << DIGIT_BITS) - 1 - bins_above
        prefix = digit - half if is_top else (prefix << DIGIT_BITS) | digit
    return _value_of_key(prefix, dtype)


def locate(
    starts: Sequence[int], counts: Sequence[int], k: int, total: int, all_reduce_sum: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
    """In which run of positions the k-th item (1-based) lies, and which item of that run it is (1-based).

    Args:
        starts: this rank's runs, by their first position in 0..total - 1; no two runs with items overlap.
        counts: number of items in each of these runs.
        k: at most the number of items on all ranks.
        total: number of positions.

    Returns:
        the start of the run that holds the k-th item, k minus the number of items in the runs before.
    """
    order = np.argsort(np.array(starts, dtype=np.int64), kind="stable")
    sorted_starts = np.array(starts, dtype=np.int64)[order]
    cumulative = np.concatenate([[0], np.array(counts, dtype=np.int64)[order].cumsum()])

    def items_up_to(positions: np.ndarray) -> np.ndarray:
        return _reduced(cumulative[np.searchsorted(sorted_starts, positions, side="right")], all_reduce_sum)

    first, last = 0, max(total - 1, 0)
    while first < last:
        step = -(-(last - first + 1) // PROBES)
        probes = np.minimum(np.arange(first + step - 1, last + step, step), last)
        hit = int(np.searchsorted(items_up_to(probes), k))
        first, last = (int(probes[hit - 1]) + 1 if hit else first), int(probes[hit])
    return first, k - int(items_up_to(np.array([first - 1]))[0])


def ordered_keys(values: np.ndarray) -> np.ndarray:
    """Map fp32 (fp64) to int32 (int64) of the same order; -0.0 and 0.0 get the same key."""
    bits = (values + values.dtype.type(0)).view(_INTEGER_OF[values.dtype])  # -0.0 + 0.0 is 0.0
    return _flip_negative(bits)


def _value_of_key(key: int, dtype: np.dtype) -> float:
    """The value whose `ordered_keys` is `key`; a Python float holds it exactly."""
    return float(_flip_negative(np.array([key], dtype=_INTEGER_OF[dtype])).view(dtype)[0])


def _flip_negative(bits: np.ndarray) -> np.ndarray:
    """Negative floats grow in magnitude with their bits: flip all but the sign. Its own inverse."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _reduced(counts: np.ndarray, all_reduce_sum: Callable[[Tensor], Tensor]) -> np.ndarray:
    return all_reduce_sum(torch.from_numpy(counts)).numpy()
