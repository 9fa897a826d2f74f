"""Where a sparse update may be non-zero: sorted flat indices, chosen by scores or at random, and how they move.

A support is a 1-D int64 tensor of strictly increasing flat indices into a matrix read row by row. It is chosen on the
CPU and returned on the device of the scores, so that every device gets the same one.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class MovedSupport(NamedTuple):
    """A support after drop-and-grow, and what to carry over.

    Attributes:
        indices: the new support, int64 `[nnz]`.
        origin: int64 `[nnz]`, the position in the old support that each entry had, or -1 where it is new. Old entries
            take their value and optimizer moments from there, new ones start from zero.
    """

    indices: Tensor
    origin: Tensor


def check_support(indices: Tensor, numel: int, name: str = "indices") -> None:
    """Refuse what is not a support, such as one from a tampered file.

    Args:
        indices: should be a 1-D int32 or int64 tensor, strictly increasing, in 0..numel - 1.
        numel: number of weights of the matrix.
        name: of the argument, for the error.

    Raises:
        ValueError: it has another dtype or shape, an index is out of range, or indices repeat or are not sorted.
    """
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"`{name}` must be a 1-D int32 or int64 tensor, got {indices.dtype} of shape {tuple(indices.shape)}: "
            "pass flat indices into the matrix, row by row."
        )
    outside = indices[(indices < 0) | (indices >= numel)]
    if outside.numel():
        raise ValueError(
            f"`{name}` must be in 0..{numel - 1}, the weights of the matrix, got {int(outside[0])}: "
            "they are the support of another matrix, or their file is damaged."
        )
    steps = indices.diff()
    if (steps == 0).any():
        repeated = int(indices[1:][steps == 0][0])
        raise ValueError(f"`{name}` must not repeat, got {repeated} more than once: give each weight one value.")
    if (steps < 0).any():
        position = int((steps < 0).nonzero()[0]) + 1
        raise ValueError(
            f"`{name}` must be sorted, got {int(indices[position])} after {int(indices[position - 1])}: "
            "sort the indices and their values together, or remove the repeats."
        )


def largest_support(scores: Tensor, nnz: int) -> Tensor:
    """The `nnz` positions of the largest |scores|; pass the weight for top-|W|, or a gradient.

    Ties are broken by position, the lowest flat index first: `nnz` positions come out even when all scores are equal
    or zero. `keep_largest` makes the same choice over many tensors at once, as masks; for one matrix this is faster.

    Args:
        scores: floating, any shape; fp16 and bf16 are compared as fp32.
        nnz: in 0..numel.

    Returns:
        int64 `[nnz]`, sorted.

    Raises:
        ValueError: `nnz` is out of range, or the scores are not floating or not finite.
    """
    _check_nnz(nnz, scores.numel())
    magnitudes = _comparable("scores", scores).abs().flatten().numpy()
    if nnz == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    cut = magnitudes.size - nnz
    threshold = np.partition(magnitudes, cut)[cut]
    chosen = magnitudes > threshold
    tied = np.flatnonzero(magnitudes == threshold)
    chosen[tied[: nnz - np.count_nonzero(chosen)]] = True
    return torch.from_numpy(np.flatnonzero(chosen)).to(scores.device)


def random_support(shape: Sequence[int], nnz: int, generator: torch.Generator) -> Tensor:
    """`nnz` positions drawn without repeats, every set of as many equally likely.

    Args:
        shape: of the matrix.
        nnz: in 0..numel.
        generator: a CPU generator; its state advances.

    Returns:
        int64 `[nnz]` on the CPU, sorted.

    Raises:
        ValueError: `nnz` is out of range, or `generator` is not on the CPU.
    """
    numel = math.prod(shape)
    _check_nnz(nnz, numel)
    check_cpu_generator(generator)
    if 2 * nnz > numel:
        return torch.randperm(numel, generator=generator)[:nnz].sort().values
    # Drawing what is still missing needs no memory for the whole matrix; at least half of each draw is expected new.
    chosen = torch.empty(0, dtype=torch.int64)
    while missing := nnz - chosen.numel():
        chosen = torch.cat([chosen, torch.randint(numel, (missing,), generator=generator)]).unique()
    return chosen


def line_support(scores: Tensor, nnz: int, lines: Literal["rows", "columns"]) -> Tensor:
    """Whole rows or columns: all positions of those whose scores have the largest squared norms.

    Args:
        scores: floating `[rows, columns]`.
        nnz: a multiple of the length of a line, in 0..numel.

    Returns:
        int64 `[nnz]`, sorted; of tied lines the lowest come first.

    Raises:
        ValueError: `nnz` makes no whole lines or is out of range, or the scores are no finite floating matrix.
    """
    if scores.dim() != 2:
        raise ValueError(f"`scores` must be a matrix, got shape {tuple(scores.shape)}: reshape them to 2-D.")
    _check_nnz(nnz, scores.numel())
    across = 1 if lines == "rows" else 0
    length, width = scores.shape[across], scores.shape[1]
    if length and nnz % length:
        below = nnz - nnz % length
        raise ValueError(
            f"`nnz` must be a multiple of {length}, the length of the {lines}, got {nnz}: "
            f"the nearest valid values are {below} and {below + length}."
        )
    # In fp64, in which squares of fp32 do not overflow.
    norms = _comparable("scores", scores).double().square().sum(across)
    chosen = largest_support(norms, nnz // max(length, 1)).to(scores.device)
    along = torch.arange(length, device=scores.device)
    grid = chosen[:, None] * width + along if lines == "rows" else along[:, None] * width + chosen
    return grid.flatten()


def move_support(
    indices: Tensor, values: Tensor, candidates: Tensor, gradients: Tensor, *, numel: int, drop_fraction: float
) -> MovedSupport:
    """Drop the entries of smallest |value| and grow as many candidates of largest |gradient|, as RigL does for masks.

    `round(drop_fraction * nnz)` entries move, or fewer when fewer candidates are outside the support. An entry that is
    dropped cannot be grown again in the same move. Ties: the lowest index stays, and the lowest index grows.

    Args:
        indices: the support, int64 `[nnz]`, see `check_support`.
        values: floating `[nnz]`, the trained values.
        candidates: int64 `[m]`, where the support may grow, sorted without repeats; those already in it do not count.
        gradients: floating `[m]`, the loss's gradient at the candidates.
        numel: number of weights of the matrix.
        drop_fraction: share of the entries to move, in [0, 1].

    Raises:
        ValueError: indices or candidates that are no support, lengths that do not match, values or gradients that are
            not finite, or a `drop_fraction` out of range.
    """
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"`drop_fraction` must be in [0, 1], got {drop_fraction}: 0.3 moves 30 % of the entries.")
    check_support(indices, numel)
    check_support(candidates, numel, "candidates")
    _check_length("values", values, "indices", indices)
    _check_length("gradients", gradients, "candidates", candidates)
    free = ~torch.isin(candidates, indices)
    moved = min(round(drop_fraction * indices.numel()), int(free.sum()))
    kept = largest_support(values, indices.numel() - moved).to(indices.device)
    grown = candidates[free][largest_support(gradients[free], moved).to(candidates.device)].to(indices.device)
    new, order = torch.cat([indices[kept], grown]).sort()
    return MovedSupport(new, torch.cat([kept, torch.full_like(grown, -1)])[order])


def check_cpu_generator(generator: torch.Generator) -> None:
    """Refuse a generator of another device, with a ValueError: its draws would depend on the device."""
    if generator.device.type != "cpu":
        raise ValueError(
            f"`generator` must live on the CPU, got {generator.device}: create it with `torch.Generator()` "
            "so that the support does not depend on the device."
        )


def _comparable(name: str, scores: Tensor) -> Tensor:
    """On the CPU in fp32 or fp64, finite."""
    if not scores.is_floating_point():
        raise ValueError(f"`{name}` must be floating, got {scores.dtype}: pass `{name}.float()`.")
    scores = scores.detach().cpu()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if not scores.isfinite().all():
        count = int((~scores.isfinite()).sum())
        raise ValueError(
            f"`{name}` must be finite, got {count} NaN or infinite values: look for where they come from."
        )
    return scores


def _check_nnz(nnz: int, numel: int) -> None:
    if not 0 <= nnz <= numel:
        raise ValueError(f"`nnz` must be in 0..{numel}, the number of weights, got {nnz}: choose fewer entries.")


def _check_length(name: str, values: Tensor, other: str, indices: Tensor) -> None:
    if values.shape != indices.shape:
        raise ValueError(
            f"`{name}` must be one per entry of `{other}`, got shape {tuple(values.shape)} for "
            f"{tuple(indices.shape)}: pass them in the same order."
        )
