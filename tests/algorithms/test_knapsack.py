import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.knapsack import choose_counts


def brute_force(values, costs, budget):
    """Highest value, then cheapest, then smallest indices."""
    choices = itertools.product(*(range(len(group)) for group in values))

    def total(numbers, choice):
        return sum(group[option] for group, option in zip(numbers, choice, strict=True))

    allowed = [choice for choice in choices if total(costs, choice) <= budget]
    return list(min(allowed, key=lambda choice: (-total(values, choice), total(costs, choice), choice)))


def test_by_hand():
    # 5 + 4 costs 9, too much; 5 + 1 costs 6 and 2 + 4 costs 7: both are worth 6, and 6 is cheaper
    assert choose_counts([[2, 5], [1, 4]], [[2, 4], [2, 5]], 8, resolution=4) == [1, 0]
    assert choose_counts([[2, 5], [1, 4]], [[2, 4], [2, 5]], 9) == [1, 1]
    assert choose_counts([[2, 5], [1, 4]], [[2, 4], [2, 5]], 4) == [0, 0]
    assert choose_counts([], [], 1.0) == []


def test_the_most_valuable_is_not_always_the_best_per_cost():
    # greedy by value per cost takes option 1 of the first group (10 for 6) and has no room for the other two
    assert choose_counts([[0, 10], [0, 7], [0, 7]], [[0, 6], [0, 5], [0, 5]], 10, resolution=10) == [0, 1, 1]


def test_ties_go_to_the_cheaper_total_then_to_smaller_indices():
    assert choose_counts([[1, 1, 1]], [[3, 2, 2]], 10) == [1]
    assert choose_counts([[0, 1], [0, 1]], [[0, 1], [0, 1]], 1, resolution=1) == [0, 1]
    # 3 in either way: the last of the first group at 1, or the second group's at 2
    assert choose_counts([[0, 3, 3], [0, 3]], [[0, 2, 1], [0, 2]], 2, resolution=2) == [2, 0]


def test_the_budget_may_be_the_cheapest_total_or_the_dearest():
    # in fp32 or fp64 sums of such costs miss the budget by a rounding error; rounded up they would never fit
    costs = [[0.1, 0.7], [0.2, 0.9], [0.4, 1.3]]
    assert choose_counts([[0, 1]] * 3, costs, 0.1 + 0.2 + 0.4 + 1e-15, resolution=3) == [0, 0, 0]
    assert choose_counts([[0, 1]] * 3, costs, 0.7 + 0.9 + 1.3 + 1e-15, resolution=3) == [1, 1, 1]
    assert choose_counts([[0, 1, 2]] * 2, [[1, 1, 2], [2, 3, 2]], 3) == [1, 2]


problems = st.lists(
    st.lists(st.tuples(st.integers(-5, 9), st.integers(0, 8)), min_size=1, max_size=4), min_size=1, max_size=4
).flatmap(lambda groups: st.tuples(st.just(groups), st.integers(0, sum(max(c for _, c in g) for g in groups))))


def split(groups):
    return [[value for value, _ in group] for group in groups], [[cost for _, cost in group] for group in groups]


@given(problems)
def test_whole_numbered_costs_are_solved_exactly(problem):
    groups, above = problem
    values, costs = split(groups)
    cheapest = sum(min(group) for group in costs)
    # one step is one unit of cost
    chosen = choose_counts(values, costs, cheapest + above, resolution=max(above, 1))
    assert chosen == brute_force(values, costs, cheapest + above)


@given(problems, st.integers(1, 40))
def test_the_budget_holds_at_any_resolution(problem, resolution):
    groups, above = problem
    values, costs = split(groups)
    budget = sum(min(group) for group in costs) + above
    chosen = choose_counts(values, costs, budget, resolution)
    assert sum(group[option] for group, option in zip(costs, chosen, strict=True)) <= budget


def test_rounding_wastes_less_than_one_step_per_group():
    generator = random.Random(0)
    costs = [sorted(generator.random() for _ in range(6)) for _ in range(5)]
    values = [sorted(generator.random() for _ in range(6)) for _ in range(5)]
    cheapest, budget = sum(group[0] for group in costs), 2.5
    chosen = choose_counts(values, costs, budget, resolution=100)
    worth = sum(group[option] for group, option in zip(values, chosen, strict=True))
    smaller = budget - 5 * (budget - cheapest) / 100
    least = brute_force(values, costs, smaller)
    assert worth >= sum(group[option] for group, option in zip(values, least, strict=True)) - 1e-12
    assert sum(group[option] for group, option in zip(costs, chosen, strict=True)) <= budget


def test_a_large_model_takes_less_than_two_seconds():
    generator = random.Random(0)
    costs = [sorted(generator.random() for _ in range(200)) for _ in range(64)]
    values = [sorted(generator.random() for _ in range(200)) for _ in range(64)]
    start = time.process_time()
    chosen = choose_counts(values, costs, 20.0)
    assert time.process_time() - start < 2
    assert 19.7 < sum(group[option] for group, option in zip(costs, chosen, strict=True)) <= 20.0  # 64 steps are 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_counts([[1], [1]], [[2], [3]], 4), "cheapest option of every group, got 4 where these cost 5"),
        (
            lambda: choose_counts([[1]], [[2], [3]], 9),
            r"`costs` must match `values`, got groups of \[1, 1\] and \[1\]",
        ),
        (lambda: choose_counts([[1, 2]], [[2]], 9), r"got groups of \[1\] and \[2\] options"),
        (lambda: choose_counts([[1], []], [[2], []], 9), "must have an option, got none at position 1"),
        (lambda: choose_counts([[1]], [[-2]], 9), "got value 1 and cost -2 in group 0"),
        (lambda: choose_counts([[1]], [[float("nan")]], 9), "cost nan in group 0"),
        (lambda: choose_counts([[float("inf")]], [[1]], 9), "got value inf"),
        (lambda: choose_counts([[1]], [[1]], float("nan")), "`budget` must be finite, got nan"),
        (lambda: choose_counts([[1]], [[1]], 9, resolution=0), "`resolution` must be at least 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
