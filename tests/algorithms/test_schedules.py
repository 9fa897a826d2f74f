from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.algorithms.schedules import cubic_sparsity, geometric_sparsity, linear_sparsity


sparsities = st.floats(0, 0.999)


def test_linear_removes_the_same_number_each_round():
    # BERT-Tickets: 10 % of the original weights per round
    assert [num_kept(1000, linear_sparsity(round, 9, 0.9)) for round in range(10)] == list(range(1000, 0, -100))


def test_geometric_removes_the_same_fraction_of_what_remains():
    # Structure-LTH: 0.8 ** round remain
    final = 1 - 0.8**4
    kept = [1 - geometric_sparsity(round, 4, final) for round in range(5)]
    assert kept == pytest.approx([1.0, 0.8, 0.64, 0.512, 0.4096])


def test_cubic_by_hand():
    # halfway: 0.8 * (1 - 0.5 ** 3)
    values = [cubic_sparsity(step, start=10, end=30, final=0.8) for step in (0, 10, 20, 30, 99)]
    assert values == pytest.approx([0.0, 0.0, 0.7, 0.8, 0.8])
    assert cubic_sparsity(20, start=10, end=30, final=0.8, initial=0.4) == pytest.approx(0.8 - 0.4 / 8)


@given(sparsities, st.integers(1, 40))
def test_rounds_start_dense_rise_and_end_exactly_at_the_final_sparsity(final, rounds):
    for schedule in (linear_sparsity, geometric_sparsity):
        values = [schedule(round, rounds, final) for round in range(rounds + 1)]
        assert values[0] == 0
        assert values[-1] == final
        assert values == sorted(values)


@given(sparsities, sparsities, st.integers(0, 50), st.integers(1, 50))
def test_cubic_rises_from_initial_to_final(one, other, start, length):
    initial, final = sorted((one, other))
    steps = range(start + length + 3)
    values = [cubic_sparsity(step, start, start + length, final, initial) for step in steps]
    assert values[start] == pytest.approx(initial)
    assert values[-1] == final
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))


@pytest.mark.parametrize("schedule", [linear_sparsity, geometric_sparsity])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, 0.5), r"`round` must be in 0..4, got -1"),
        ((5, 4, 0.5), r"`round` must be in 0..4, got 5"),
        ((0, 0, 0.5), r"`rounds` must be at least 1, got 0"),
        ((1, 4, 1.0), r"`final` must be a sparsity in \[0, 1\), got 1.0"),
        ((1, 4, float("nan")), r"`final` must be a sparsity in \[0, 1\), got nan"),
    ],
)
def test_round_schedules_refuse(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 5, 0.5), "0 <= start < end, got 5 and 5"),
        ((0, -1, 5, 0.5), "0 <= start < end, got -1 and 5"),
        ((-1, 0, 5, 0.5), "`step` must be at least 0, got -1"),
        ((0, 0, 5, 0.5, 0.6), r"`initial` must be at most `final` \(0.5\), got 0.6"),
        ((0, 0, 5, 60), r"`final` must be a sparsity in \[0, 1\), got 60"),
    ],
)
def test_cubic_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        cubic_sparsity(*arguments)
