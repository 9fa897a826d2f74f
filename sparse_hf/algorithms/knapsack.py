"""One option per group, the most value for a budget: the multiple-choice knapsack problem."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def choose_counts(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, resolution: int = 4096
) -> list[int]:
    """Pick one option of every group such that the total value is highest and the total cost within the budget.

    For latency-aware pruning a group is one layer's heads or neurons and an option a count to keep: its value is the
    sum of the scores kept, its cost is milliseconds (or FLOPs).

    What the budget leaves above the cheapest options is cut into `resolution` steps, and what an option costs more
    than the cheapest of its group is rounded up to whole steps. The budget therefore always holds, some choice always
    exists, and dynamic programming finds the best one exactly in these rounded costs; rounding wastes less than one
    step per group. Nothing is rounded where the most valuable options of all groups fit together. Ties go to the
    cheaper total (in steps), then to the smaller index in the first group that differs.

    Args:
        values: of each group, the value of each option; any sign.
        costs: of each group, the cost of each option, at least 0, in the unit of `budget`.
        budget: the most that the chosen options may cost together.
        resolution: number of steps. Time and memory grow with it.

    Returns:
        the index of the chosen option of each group.

    Raises:
        ValueError: lists that do not match, an empty group, values or costs that are not finite, negative costs, or a
            budget below the cheapest options.
    """
    _check_problem(values, costs, budget, resolution)
    spare = Fraction(budget) - sum((Fraction(min(group)) for group in costs), Fraction(0))
    if spare < 0:
        raise ValueError(
            f"`budget` must allow the cheapest option of every group, got {budget} where these cost "
            f"{math.fsum(min(group) for group in costs)} together: raise the budget or offer cheaper options."
        )
    extra = [[Fraction(cost) - Fraction(min(group)) for cost in group] for group in costs]
    wished = [_most_valuable(group, above) for group, above in zip(values, extra, strict=True)]
    if sum(above[option] for above, option in zip(extra, wished, strict=True)) <= spare:
        return wished
    # Something costs extra and does not fit. Without anything to spare only the cheapest options are left.
    step = spare / resolution or min(cost for above in extra for cost in above if cost)
    steps = [[math.ceil(cost / step) for cost in above] for above in extra]
    return _best_choice(values, steps, resolution if spare else 0)


def _most_valuable(values: Sequence[float], costs: Sequence[Fraction]) -> int:
    return min(range(len(values)), key=lambda option: (-values[option], costs[option]))


def _best_choice(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """The exact solution for whole-numbered costs; every group has an option of cost 0."""
    # best[c] is the highest value of the groups seen so far, the last ones, at a cost of exactly c.
    best = np.full(capacity + 1, -np.inf)
    best[0] = 0.0
    picks = []
    for group, group_costs in zip(reversed(values), reversed(costs), strict=True):
        best, pick = _add_group(best, group, group_costs)
        picks.append(pick)
    left = int(best.argmax())  # the first maximum: the cheapest
    chosen = []
    for pick, group_costs in zip(reversed(picks), costs, strict=True):
        chosen.append(int(pick[left]))
        left -= group_costs[chosen[-1]]
    return chosen


def _add_group(best: np.ndarray, values: Sequence[float], costs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The best values with one more group, and its option (the smallest index of equals) at each cost."""
    total = np.full_like(best, -np.inf)
    pick = np.zeros(len(best), dtype=np.int32)
    for option, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if cost >= len(best):
            continue
        candidate = best[: len(best) - cost] + value
        better = candidate > total[cost:]
        np.copyto(total[cost:], candidate, where=better)
        np.copyto(pick[cost:], option, where=better)
    return total, pick


def _check_problem(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, resolution: int
) -> None:
    if [len(group) for group in values] != [len(group) for group in costs]:
        raise ValueError(
            f"`costs` must match `values`, got groups of {[len(group) for group in costs]} and "
            f"{[len(group) for group in values]} options: give each option a value and a cost."
        )
    for position, (group, group_costs) in enumerate(zip(values, costs, strict=True)):
        if len(group) == 0:
            raise ValueError(f"Every group must have an option, got none at position {position}: leave it out.")
        for value, cost in zip(group, group_costs, strict=True):
            if not (math.isfinite(value) and 0 <= cost < math.inf):
                raise ValueError(
                    f"Values must be finite and costs finite and at least 0, got value {value} and cost {cost} in "
                    f"group {position}: measure again or leave the option out."
                )
    if not math.isfinite(budget):
        raise ValueError(f"`budget` must be finite, got {budget}: pass the total of `costs` to allow everything.")
    if resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, got {resolution}: 4096 wastes little.")
