"""The exact top-k over pieces on any number of ranks, in one pass over the scores in the usual case.

A sample brackets the threshold; one scan sets the masks above the bracket and collects the few values inside; an exact
select among these finds the threshold. A bracket that misses costs time, never exactness. Every decision is taken on
numbers added up over ranks (see `joint_sums`), so that all ranks take the same one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_hf.algorithms.block_scan import (
    Bracketed,
    Piece,
    candidate_values,
    count_equal,
    keep_equal,
    keep_positions,
    sample_values,
    scan,
)
from sparse_hf.algorithms.joint_sums import Summing, summed, together
from sparse_hf.algorithms.order_statistic import kth_largest, locate


SIGMAS = 5
SAMPLE_SIZE = 1 << 18
UNSAMPLED = 1 << 14  # so few values are all collected


@dataclass(frozen=True)
class Model:
    """What all ranks know alike: whole tensors, and how to compare their scores."""

    numels: tuple[int, ...]
    names: Sequence[str]
    dtype: np.dtype


def keep_top(
    pieces: Sequence[Piece], num_keep: int, tensors: Sequence[int], num_candidates: int, model: Model
) -> Summing[None]:
    """Write the masks of `pieces`: the `num_keep` largest candidates of `tensors`, ties by position.

    Args:
        pieces: this rank's pieces of `tensors`.
        num_keep: at most `num_candidates`.
        tensors: positions in `model.numels`, the same on all ranks.
        num_candidates: number of candidates in `tensors`, on all ranks.

    Raises:
        ValueError: a score is NaN or infinite (on all ranks alike).
    """
    total = sum(model.numels[tensor] for tensor in tensors)
    low, high = yield from _bracket(pieces, num_keep, total, num_candidates, model)
    found, num_above, num_inside = yield from _scan_all(pieces, low, high, model)
    num_missing = num_keep - num_above - num_inside
    if num_above == num_keep:
        return
    if num_above < num_keep and num_missing <= 0:
        yield from _keep_inside(pieces, found, num_keep - num_above, model)
        return
    if num_missing > 0 and math.isfinite(low):
        # All that lies above `low` stays; the rest comes from a mass of scores equal to `low`, if it is large enough.
        for piece, bracketed in zip(pieces, found, strict=True):
            keep_positions(piece, bracketed.positions)
        if (yield from _keep_equal(pieces, low, num_missing, model)):
            return
    # The bracket missed: select over all values.
    del found
    threshold, num_larger = yield from kth_largest(
        lambda: (values for piece in pieces for values in candidate_values(piece)), num_keep, model.dtype
    )
    yield from _scan_all(pieces, threshold, threshold, model)
    yield from _keep_equal(pieces, threshold, num_keep - num_larger, model)


def _bracket(
    pieces: Sequence[Piece], num_keep: int, total: int, num_candidates: int, model: Model
) -> Summing[tuple[float, float]]:
    """Two values that hold the threshold, low <= threshold <= high, as good as surely; infinite where unknown."""
    if total <= UNSAMPLED:
        return -math.inf, math.inf
    rate = sample_size(total) / total
    sample = _join([sample_values(piece, rate) for piece in pieces], model.dtype)
    [size] = yield from summed(sample.size)
    density = num_keep / max(num_candidates, 1)
    margin = SIGMAS * math.sqrt(density * (1 - density) * size) + 2
    rank_high, rank_low = math.floor(density * size - margin), math.ceil(density * size + margin)
    ranks = [rank for rank in (rank_high, rank_low) if 1 <= rank <= size]
    found = yield from together([kth_largest(lambda: iter([sample]), rank, model.dtype) for rank in ranks])
    values = dict(zip(ranks, [value for value, _ in found], strict=True))
    return values.get(rank_low, -math.inf), values.get(rank_high, math.inf)


def sample_size(total: int) -> int:
    """How many of `total` values are drawn, so that they and those inside the bracket are few together.

    The bracket holds 2 SIGMAS sqrt(density (1 - density) / size) of all values, at most 5 total / sqrt(size). The sum
    of this and the size is least at a size of (2.5 total)^(2/3).
    """
    return min(SAMPLE_SIZE, math.ceil((2.5 * total) ** (2 / 3)))


def _scan_all(
    pieces: Sequence[Piece], low: float, high: float, model: Model
) -> Summing[tuple[list[Bracketed], int, int]]:
    """Scan every piece; the counts above and inside the bracket are of all ranks."""
    found = [scan(piece, low, high) for piece in pieces]
    infinite = [0] * len(model.numels)
    for piece, bracketed in zip(pieces, found, strict=True):
        infinite[piece.tensor] += not bracketed.finite
    num_above = sum(bracketed.num_above for bracketed in found)
    num_inside = sum(bracketed.positions.size for bracketed in found)
    num_above, num_inside, *infinite = yield from summed(num_above, num_inside, *infinite)
    if any(infinite):
        position = next(i for i, count in enumerate(infinite) if count)
        raise ValueError(
            f"Scores must be finite, got NaN or infinity in {model.names[position]}: "
            "training may have diverged, check the loss."
        )
    return found, num_above, num_inside


def _keep_inside(pieces: Sequence[Piece], found: Sequence[Bracketed], num_keep: int, model: Model) -> Summing[None]:
    """Keep the `num_keep` largest of the collected values; of those equal to the last, the first."""
    values = _join([bracketed.values for bracketed in found], model.dtype)
    threshold, num_larger = yield from kth_largest(lambda: iter([values]), num_keep, model.dtype)
    num_ties = [np.count_nonzero(bracketed.values == threshold) for bracketed in found]
    last_start, num_in_last = yield from locate(
        [piece.start for piece in pieces], num_ties, num_keep - num_larger, sum(model.numels)
    )
    for piece, bracketed in zip(pieces, found, strict=True):
        if piece.start < last_start:
            kept = bracketed.positions[bracketed.values >= threshold]
        else:
            kept = bracketed.positions[bracketed.values > threshold]
        if piece.start == last_start:
            kept = np.concatenate([kept, bracketed.positions[bracketed.values == threshold][:num_in_last]])
        keep_positions(piece, kept)


def _keep_equal(pieces: Sequence[Piece], value: float, num_keep: int, model: Model) -> Summing[bool]:
    """Keep the first `num_keep` candidates equal to `value`; False, and nothing done, if there are fewer."""
    starts, counts = [], []
    for piece in pieces:
        piece_starts, piece_counts = count_equal(piece, value)
        starts += piece_starts
        counts += piece_counts
    [num_equal] = yield from summed(sum(counts))
    if num_equal < num_keep:
        return False
    last_start, num_in_last = yield from locate(starts, counts, num_keep, sum(model.numels))
    for piece in pieces:
        keep_equal(piece, value, last_start, num_in_last)
    return True


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
