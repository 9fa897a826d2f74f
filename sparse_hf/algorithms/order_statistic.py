"""The k-th largest of values that are spread over blocks and ranks, without ever putting them together.

A radix select: floats become integers of the same order, and each pass counts one 8-bit digit. Only counts travel:
both searches yield what they want added up over ranks (see `joint_sums`) and come to the same result on all of them.
numpy rather than torch: these are many short operations, on which torch's threads lose more time than they save.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from sparse_hf.algorithms.joint_sums import Summing


# Few bits send little and make more sums: 8 KiB in 4 for fp32, where 16 bits would send 1 MiB in 2.
DIGIT_BITS = 8
PROBES = 1 << 6
CHUNK = 1 << 15  # values, which with what is made of them stay in a core's cache

_INTEGER_OF = {np.dtype(np.float32): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.int64)}


def kth_largest(blocks: Callable[[], Iterable[np.ndarray]], k: int, dtype: np.dtype) -> Summing[tuple[float, int]]:
    """The k-th largest value in the blocks of all ranks, exactly, and how many values are larger than it.

    Args:
        blocks: returns an iterable over this rank's 1-D arrays; called once per digit, so that they can be made on
            the fly instead of stored.
        k: 1-based rank, 1 = the largest; at most the number of values on all ranks.
        dtype: of the values, fp32 (4 sums of 2 KiB) or fp64 (8).
    """
    num_larger, prefix = 0, None
    for shift in range(8 * dtype.itemsize - DIGIT_BITS, -1, -DIGIT_BITS):
        from_the_top = (yield _count_digits(blocks(), shift, prefix))[::-1].cumsum()
        bins_above = int(np.searchsorted(from_the_top, k - num_larger))
        if bins_above:
            num_larger += int(from_the_top[bins_above - 1])
        digit = (1 << DIGIT_BITS) - 1 - bins_above
        prefix = digit - (1 << (DIGIT_BITS - 1)) if prefix is None else (prefix << DIGIT_BITS) | digit
    return _value_of_key(prefix, dtype), num_larger


def _count_digits(blocks: Iterable[np.ndarray], shift: int, prefix: int | None) -> np.ndarray:
    """How often each digit occurs at `shift` among the values whose digits before it are `prefix`; None for the first.

    The first digit is signed; half of its range is added, which puts the negative numbers first.
    """
    counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
    for values in _in_cache(blocks):
        keys = ordered_keys(values)
        if prefix is None:
            digits = (keys >> shift) + (1 << (DIGIT_BITS - 1))
        else:
            keys = keys[(keys >> (shift + DIGIT_BITS)) == prefix]
            digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
        counts += np.bincount(digits, minlength=1 << DIGIT_BITS)
    return counts


def _in_cache(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for values in blocks:
        for start in range(0, values.size, CHUNK):
            yield values[start : start + CHUNK]


def locate(starts: Sequence[int], counts: Sequence[int], k: int, total: int) -> Summing[tuple[int, int]]:
    """In which run of positions the k-th item (1-based) lies, and which item of that run it is (1-based).

    Args:
        starts: this rank's runs, by their first position in 0..total - 1; no two runs with items overlap.
        counts: number of items in each of these runs.
        k: at least 1, at most the number of items on all ranks.
        total: number of positions.

    Returns:
        the start of the run that holds the k-th item, k minus the number of items in the runs before.
    """
    order = np.argsort(np.array(starts, dtype=np.int64), kind="stable")
    sorted_starts = np.array(starts, dtype=np.int64)[order]
    cumulative = np.concatenate([[0], np.array(counts, dtype=np.int64)[order].cumsum()])
    first, last, before = 0, max(total - 1, 0), 0
    while first < last:
        probes = _probes(first, last)
        items_up_to = yield cumulative[np.searchsorted(sorted_starts, probes, side="right")]
        hit = int(np.searchsorted(items_up_to, k))
        if hit:
            first, before = int(probes[hit - 1]) + 1, int(items_up_to[hit - 1])
        last = int(probes[hit])
    return first, k - before


def _probes(first: int, last: int) -> np.ndarray:
    """At most `PROBES` positions that cut first..last into even parts, the ends of which they are."""
    step = -(-(last - first + 1) // PROBES)
    return np.minimum(np.arange(first + step - 1, last + step, step), last)


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
