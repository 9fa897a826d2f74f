import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.budgets import (
    allocate,
    erdos_renyi_budget,
    erdos_renyi_kernel_budget,
    num_kept,
    uniform_budget,
)


@pytest.mark.parametrize(
    ("numel", "sparsity", "kept"), [(10, 0.0, 10), (10, 0.6, 4), (3, 0.5, 2), (5, 0.5, 2), (1, 0.9, 0), (0, 0.5, 0)]
)
def test_num_kept_rounds(numel, sparsity, kept):
    assert num_kept(numel, sparsity) == kept


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 60, float("nan")])
def test_num_kept_refuses(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
        num_kept(10, sparsity)


def test_allocate_by_hand():
    # 10 units at 1:2:2 are 2, 4, 4
    assert allocate([1, 2, 2], 10, [10, 10, 10]) == [2, 4, 4]
    # the second is full at 3; the other 7 go 1:2, which is 2 1/3 and 4 2/3
    assert allocate([1, 2, 2], 10, [10, 3, 10]) == [2, 3, 5]
    # the first gets its minimum, the others share 9 equally; the leftover unit goes to the lower index
    assert allocate([0.01, 1, 1], 10, [10, 10, 10]) == [1, 5, 4]


def test_allocate_with_too_little_for_all_serves_the_larger_weights_first():
    assert allocate([1, 3, 2], 2, [5, 5, 5]) == [0, 1, 1]
    assert allocate([1, 1, 1], 2, [5, 5, 5]) == [1, 1, 0]
    assert allocate([1, 100], 3, [5, 5], minimum=2) == [1, 2]


def test_allocate_allows_zero_when_asked():
    assert allocate([1, 100], 10, [50, 50], minimum=0) == [0, 10]


allocations = st.lists(
    st.tuples(st.floats(1e-3, 1e6), st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=8
).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, sum(row[1] for row in rows)), st.integers(0, 3)))


@given(allocations)
def test_allocate_is_exact_within_its_limits_and_monotone(problem):
    rows, total, minimum = problem
    weights, capacities = [row[0] for row in rows], [row[1] for row in rows]
    counts = allocate(weights, total, capacities, minimum)
    assert sum(counts) == total
    assert all(0 <= count <= capacity for count, capacity in zip(counts, capacities, strict=True))
    lower = [min(minimum, capacity) for capacity in capacities]
    if total >= sum(lower):
        assert all(count >= least for count, least in zip(counts, lower, strict=True))
    for i in range(len(counts)):
        for j in range(len(counts)):
            # a larger weight never gets less, unless its capacity stops it
            if weights[i] > weights[j] and counts[i] < counts[j]:
                assert counts[i] == capacities[i]


def test_uniform_keeps_the_same_density():
    assert uniform_budget([100, 300], 40) == [10, 30]
    # an earlier mask left only 5 of the first
    assert uniform_budget([100, 300], 40, [5, 300]) == [5, 35]


def test_erdos_renyi_density_is_proportional_to_the_sum_over_the_product():
    shapes = [(8, 8), (16, 64)]
    # counts proportional to 16 and 80
    assert erdos_renyi_budget(shapes, 96) == [16, 80]
    assert erdos_renyi_budget(shapes, 96) == erdos_renyi_kernel_budget(shapes, 96)


def test_the_kernel_counts_only_in_erk():
    shapes = [(8, 8, 3, 3), (8, 8)]
    assert erdos_renyi_budget(shapes, 100) == [90, 10]  # 16 * 9 to 16
    assert erdos_renyi_kernel_budget(shapes, 38) == [22, 16]  # 22 to 16


def test_layers_that_would_exceed_density_1_are_dense():
    # 16 : 200, which would give the first 74 of its 64; the rest goes to the second
    assert erdos_renyi_budget([(8, 8), (100, 100)], 1000) == [64, 936]


def test_bert_base_at_70_percent():
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    shapes = layer * 12 + [(768, 768)]
    keep = num_kept(85_524_480, 0.7)
    for budget in (erdos_renyi_budget(shapes, keep), uniform_budget([math.prod(s) for s in shapes], keep)):
        assert sum(budget) == keep
        assert max(budget[:4]) - min(budget[:4]) <= 1  # same shapes differ by rounding only
    densities = [kept / math.prod(shape) for kept, shape in zip(erdos_renyi_budget(shapes, keep), shapes, strict=True)]
    assert densities[0] / densities[4] == pytest.approx((1536 / 768**2) / (3840 / (3072 * 768)), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: allocate([1], 5, [4]), r"`total` must be in 0..4, the sum of the capacities, got 5"),
        (lambda: allocate([1], -1, [4]), r"`total` must be in 0..4"),
        (lambda: allocate([1, 0], 2, [4, 4]), "`weights` must be positive and finite, got 0 at position 1"),
        (lambda: allocate([1], 2, [4, 4]), "one capacity per weight, got 2 for 1"),
        (lambda: allocate([1], 2, [4], minimum=-1), "must be at least 0, got -1"),
        (lambda: erdos_renyi_budget([(8,)], 2), r"`shapes` must be \(out, in, \*kernel\), got \(8,\) at position 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
