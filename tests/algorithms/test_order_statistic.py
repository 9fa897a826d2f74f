import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.joint_sums import added_up, alone, together
from sparse_hf.algorithms.order_statistic import kth_largest, locate, ordered_keys


ORDERED = [-math.inf, -3.5, -1.0, -1e-40, 0.0, 1e-40, 1.0, 1.0000001, 3.5, math.inf]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_have_the_order_of_the_values(dtype):
    keys = ordered_keys(np.array(ORDERED, dtype=dtype))
    assert (np.diff(keys) > 0).all()
    assert ordered_keys(np.array([-0.0], dtype=dtype)) == ordered_keys(np.array([0.0], dtype=dtype)) == 0


@pytest.mark.parametrize("width", [32, 64])
@given(data=st.data())
def test_kth_largest_is_that_of_the_sorted_values(width, data):
    floats = st.floats(width=width, allow_nan=False)
    blocks = data.draw(st.lists(st.lists(floats, max_size=6), min_size=1, max_size=4).filter(any))
    arrays = [np.array(block, dtype=f"float{width}") for block in blocks]
    ordered = sorted(np.concatenate(arrays).tolist(), reverse=True)
    k = data.draw(st.integers(1, len(ordered)))
    value, num_larger = added_up(kth_largest(lambda: iter(arrays), k, np.dtype(f"float{width}")), alone)
    assert (value, num_larger) == (ordered[k - 1], sum(one > value for one in ordered))


def test_kth_largest_counts_the_values_of_all_ranks():
    # The other rank holds one value, 2.0, which tips the median of these.
    here = np.array([1.0, 3.0], dtype=np.float32)
    there = np.array([2.0], dtype=np.float32)
    other_rank = []
    alone_there = kth_largest(lambda: iter([there]), 1, here.dtype)
    added_up(alone_there, lambda counts: other_rank.append(counts.clone()) or counts)
    calls = iter(other_rank)
    both = kth_largest(lambda: iter([here]), 2, here.dtype)
    assert added_up(both, lambda counts: counts + next(calls)) == (2.0, 1)


@pytest.mark.parametrize(("width", "sums"), [(32, 4), (64, 8)])
def test_a_digit_is_a_sum_of_two_kibibytes(width, sums):
    sizes = []
    values = np.arange(100_000, dtype=f"float{width}")
    found = kth_largest(lambda: iter([values]), 17, values.dtype)
    assert added_up(found, lambda counts: sizes.append(counts.nbytes) or counts) == (99_983.0, 16)
    assert sizes == [2048] * sums


def test_locate_by_hand():
    # runs at 0, 10 and 40 with 2, 0 and 3 items: the third item is the first of the run at 40
    starts, counts = [40, 0, 10], [3, 2, 0]
    found = added_up(together([locate(starts, counts, k, 50) for k in range(1, 6)]), alone)
    assert found == [(0, 1), (0, 2), (40, 1), (40, 2), (40, 3)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.integers(1, 5000), st.data())
def test_locate_finds_every_item(counts, spacing, data):
    starts = [i * spacing for i in range(len(counts))]
    owners = [(start, item + 1) for start, count in zip(starts, counts, strict=True) for item in range(count)]
    k = data.draw(st.integers(1, len(owners)))
    assert added_up(locate(starts, counts, k, len(counts) * spacing), alone) == owners[k - 1]
