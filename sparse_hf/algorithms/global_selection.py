"""The exact top-k over pieces on any number of ranks, in one pass over the scores in the usual case.

A sample brackets the threshold; one scan sets the masks above the bracket and collects the few values inside; an exact
select among these finds the threshold. A bracket that misses costs time, never exactness. Every decision is taken on
all-reduced numbers, so that all ranks take the same one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
from sparse_hf.algorithms.order_statistic import kth_largest, locate


SAMPLE_SIZE = 1 << 18
SIGMAS = 5


@dataclass(frozen=True)
class Model:
    """What all ranks know alike: whole tensors, how to compare their scores, and how to add up counts."""

    numels: tuple[int, ...]
    names: Sequence[str]
    dtype: np.dtype
    all_reduce_sum: Callable[[Tensor], Tensor]

    def sum(self, *counts: int) -> list[int]:
        """The sums of local counts over all ranks."""
        return self.all_reduce_sum(torch.tensor(counts, dtype=torch.int64)).tolist()

    def kth_largest(self, blocks: Callable[[], Iterator[np.ndarray]], k: int) -> float:
        """The k-th largest value in the blocks of all ranks."""
        return kth_largest(blocks, k, self.dtype, self.all_reduce_sum)

    def locate(self, starts: Sequence[int], counts: Sequence[int], k: int) -> tuple[int, int]:
        """In which run of positions the k-th item of all ranks lies, and which item of that run it is."""
        return locate(starts, counts, k, sum(self.numels), self.all_reduce_sum)


def keep_top(
    pieces: Sequence[Piece], num_keep: int, tensors: Sequence[int], num_candidates: int, model: Model
) -> None:
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
    low, high = _bracket(pieces, num_keep, total, num_candidates, model)
    found, num_above, num_inside = _scan_all(pieces, low, high, model)
    num_missing = num_keep - num_above - num_inside
    if num_above == num_keep:
        return
    if num_above < num_keep and num_missing <= 0:
        _keep_inside(pieces, found, num_keep - num_above, model)
        return
    if num_missing > 0 and math.isfinite(low):
        # All that lies above `low` stays; the rest comes from a mass of scores equal to `low`, if it is large enough.
        for piece, bracketed in zip(pieces, found, strict=True):
            keep_positions(piece, bracketed.positions)
        if _keep_equal(pieces, low, num_missing, model):
            return
    # The bracket missed: select over all values.
    threshold = model.kth_largest(lambda: (values for piece in pieces for values in candidate_values(piece)), num_keep)
    _, num_above, _ = _scan_all(pieces, threshold, threshold, model)
    _keep_equal(pieces, threshold, num_keep - num_above, model)


def _bracket(
    pieces: Sequence[Piece], num_keep: int, total: int, num_candidates: int, model: Model
) -> tuple[float, float]:
    """Two values that hold the threshold, low <= threshold <= high, as good as surely; infinite where unknown."""
    if total <= 2 * SAMPLE_SIZE:
        return -math.inf, math.inf
    sample = _join([sample_values(piece, SAMPLE_SIZE / total) for piece in pieces], model.dtype)
    [size] = model.sum(sample.size)
    density = num_keep / max(num_candidates, 1)
    margin = SIGMAS * math.sqrt(density * (1 - density) * size) + 2
    rank_high, rank_low = math.floor(density * size - margin), math.ceil(density * size + margin)
    high = model.kth_largest(lambda: iter([sample]), rank_high) if rank_high >= 1 else math.inf
    low = model.kth_largest(lambda: iter([sample]), rank_low) if rank_low <= size else -math.inf
    return low, high


def _scan_all(pieces: Sequence[Piece], low: float, high: float, model: Model) -> tuple[list[Bracketed], int, int]:
    """Scan every piece; the counts above and inside the bracket are of all ranks."""
    found = [scan(piece, low, high) for piece in pieces]
    infinite = [0] * len(model.numels)
    for piece, bracketed in zip(pieces, found, strict=True):
        infinite[piece.tensor] += not bracketed.finite
    num_above = sum(bracketed.num_above for bracketed in found)
    num_inside = sum(bracketed.positions.size for bracketed in found)
    num_above, num_inside, *infinite = model.sum(num_above, num_inside, *infinite)
    if any(infinite):
        position = next(i for i, count in enumerate(infinite) if count)
        raise ValueError(
            f"Scores must be finite, got NaN or infinity in {model.names[position]}: "
            "training may have diverged, check the loss."
        )
    return found, num_above, num_inside


def _keep_inside(pieces: Sequence[Piece], found: Sequence[Bracketed], num_keep: int, model: Model) -> None:
    """Keep the `num_keep` largest of the collected values; of those equal to the last, the first."""
    values = _join([bracketed.values for bracketed in found], model.dtype)
    threshold = model.kth_largest(lambda: iter([values]), num_keep)
    [num_larger] = model.sum(np.count_nonzero(values > threshold))
    num_ties = [np.count_nonzero(bracketed.values == threshold) for bracketed in found]
    last_start, num_in_last = model.locate([piece.start for piece in pieces], num_ties, num_keep - num_larger)
    for piece, bracketed in zip(pieces, found, strict=True):
        if piece.start < last_start:
            kept = bracketed.positions[bracketed.values >= threshold]
        else:
            kept = bracketed.positions[bracketed.values > threshold]
        if piece.start == last_start:
            kept = np.concatenate([kept, bracketed.positions[bracketed.values == threshold][:num_in_last]])
        keep_positions(piece, kept)


def _keep_equal(pieces: Sequence[Piece], value: float, num_keep: int, model: Model) -> bool:
    """Keep the first `num_keep` candidates equal to `value`; False, and nothing done, if there are fewer."""
    starts, counts = [], []
    for piece in pieces:
        piece_starts, piece_counts = count_equal(piece, value)
        starts += piece_starts
        counts += piece_counts
    [num_equal] = model.sum(sum(counts))
    if num_equal < num_keep:
        return False
    last_start, num_in_last = model.locate(starts, counts, num_keep)
    for piece in pieces:
        keep_equal(piece, value, last_start, num_in_last)
    return True


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
