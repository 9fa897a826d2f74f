"""How much is kept in each place: exact counts that add up to the total.

Counts, never fractions, travel through the house: `num_kept` is the only place where a fraction becomes a count.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction


def num_kept(numel: int, sparsity: float) -> int:
    """`round(numel * (1 - sparsity))`: how many of `numel` weights stay. May be 0.

    Args:
        numel: number of prunable weights, at least 0.
        sparsity: fraction to remove, in [0, 1).

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), got {sparsity}: 0.6 removes 60 % of the weights.")
    if numel < 0:
        raise ValueError(f"`numel` must be at least 0, got {numel}: pass a number of weights.")
    return round(numel * (1 - sparsity))


def uniform_budget(numels: Sequence[int], num_keep: int, capacities: Sequence[int] | None = None) -> list[int]:
    """The same density in every tensor.

    Args:
        numels: number of weights of each tensor.
        num_keep: total to keep.
        capacities: most that may be kept in each tensor, default all; lower when nested in an earlier mask.

    Returns:
        the number to keep in each tensor, summing to `num_keep`.

    Raises:
        ValueError: see `allocate`.
    """
    return allocate(numels, num_keep, numels if capacities is None else capacities)


def erdos_renyi_budget(
    shapes: Sequence[Sequence[int]], num_keep: int, capacities: Sequence[int] | None = None
) -> list[int]:
    """Erdős–Rényi (SET): the density of an (out, in, *kernel) tensor is proportional to (out + in) / (out * in).

    The kernel dimensions do not count. A tensor that would exceed its capacity is kept dense and the others share the
    rest, as in the RigL code; unlike it, and unlike the Bernoulli masks of ITOP, the counts are exact.

    Args:
        shapes: (out, in, *kernel) of each tensor.
        num_keep: total to keep.
        capacities: most that may be kept in each tensor, default all; lower when nested in an earlier mask.

    Returns:
        the number to keep in each tensor, summing to `num_keep`.

    Raises:
        ValueError: a shape has fewer than two dimensions; see also `allocate`.
    """
    _check_shapes(shapes)
    weights = [(out + inner) * math.prod(kernel) for out, inner, *kernel in shapes]
    return allocate(weights, num_keep, _capacities(shapes, capacities))


def erdos_renyi_kernel_budget(
    shapes: Sequence[Sequence[int]], num_keep: int, capacities: Sequence[int] | None = None
) -> list[int]:
    """ERK (RigL): density proportional to sum(shape) / prod(shape), so that the count is proportional to sum(shape).

    For matrices it is `erdos_renyi_budget`. The arguments, result and errors are the same.
    """
    _check_shapes(shapes)
    return allocate([sum(shape) for shape in shapes], num_keep, _capacities(shapes, capacities))


def allocate(weights: Sequence[float], total: int, capacities: Sequence[int], minimum: int = 1) -> list[int]:
    """Share out `total` in proportion to `weights`, between a minimum and a capacity each, with an exact sum.

    Water-filling: shares are `level * weight`, clamped to [minimum, capacity], with the one level that meets the
    total. They are rounded by largest remainder, ties to the lower index. The arithmetic is exact (fractions), so
    the result depends neither on the machine nor on the order of summation.

    Args:
        weights: positive where the capacity is positive.
        total: what to share out, in 0..sum(capacities).
        capacities: upper limit of each share.
        minimum: lower limit of each share (of those whose capacity allows it). When `total` is too small to give the
            minimum to all, nobody gets more than the minimum, and the larger weights get it first.

    Raises:
        ValueError: lengths differ, a number is out of its range, or `total` exceeds the capacities.
    """
    _check_allocation(weights, total, capacities, minimum)
    lower = [min(minimum, capacity) for capacity in capacities]
    if total < sum(lower):
        return allocate(weights, total, lower, minimum=0)
    exact = [
        Fraction(weight) if capacity else Fraction(0) for weight, capacity in zip(weights, capacities, strict=True)
    ]
    shares = _water_fill(exact, total, lower, capacities)
    counts = [math.floor(share) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    # Each leftover unit belongs to a share with a fraction, which is therefore below its whole-numbered capacity.
    for i in remainders[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _water_fill(weights: Sequence[Fraction], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[Fraction]:
    """Shares `clamp(level * weight, lower, upper)` that sum to `total`, for sum(lower) <= total <= sum(upper)."""

    def shares(level: Fraction) -> list[Fraction]:
        return [
            min(max(level * w, Fraction(lo)), Fraction(up)) for w, lo, up in zip(weights, lower, upper, strict=True)
        ]

    # The sum grows with the level, and is linear between two levels at which a share leaves or meets its limit.
    limits = [(w, limit) for w, lo, up in zip(weights, lower, upper, strict=True) for limit in (lo, up) if w > 0]
    levels = sorted({Fraction(0), *(limit / w for w, limit in limits)})
    above = bisect_left(levels, total, key=lambda level: sum(shares(level)))
    if above == 0:
        return shares(levels[0])
    low, high = levels[above - 1], levels[above]
    sum_low, sum_high = sum(shares(low)), sum(shares(high))
    return shares(low + (high - low) * (total - sum_low) / (sum_high - sum_low))


def _capacities(shapes: Sequence[Sequence[int]], capacities: Sequence[int] | None) -> Sequence[int]:
    return [math.prod(shape) for shape in shapes] if capacities is None else capacities


def _check_shapes(shapes: Sequence[Sequence[int]]) -> None:
    for position, shape in enumerate(shapes):
        if len(shape) < 2:
            raise ValueError(
                f"`shapes` must be (out, in, *kernel), got {tuple(shape)} at position {position}: "
                "biases and norms have no Erdős–Rényi density, leave them out."
            )


def _check_allocation(weights: Sequence[float], total: int, capacities: Sequence[int], minimum: int) -> None:
    if len(weights) != len(capacities):
        raise ValueError(f"There must be one capacity per weight, got {len(capacities)} for {len(weights)}: match.")
    if minimum < 0 or any(capacity < 0 for capacity in capacities):
        raise ValueError(
            f"`minimum` and `capacities` must be at least 0, got {minimum} and {min(capacities, default=0)}: "
            "pass counts."
        )
    for position, (weight, capacity) in enumerate(zip(weights, capacities, strict=True)):
        if capacity > 0 and not 0 < weight < math.inf:
            raise ValueError(
                f"`weights` must be positive and finite, got {weight} at position {position}: leave it out."
            )
    if not 0 <= total <= sum(capacities):
        raise ValueError(
            f"`total` must be in 0..{sum(capacities)}, the sum of the capacities, got {total}: "
            "ask for a higher sparsity."
        )
