"""Which units stay: attention heads and FFN neurons by their scores, an exact number in whole blocks."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from sparse_hf.algorithms.budgets import num_kept


# Equal scores at the cut that hold no more than this share of the units are a coincidence of fp32, see `tied_at_cut`.
COINCIDENCE = 0.01


def select_units(
    scores: Sequence[Tensor], fraction: float, scope: Literal["layer", "global"], multiple_of: int = 1
) -> list[Tensor]:
    """Prune a fraction of the units: the lowest scores, of every layer alone or of all layers together.

    The units of a layer are sorted by score (ties: the lower index first) and cut into blocks of `multiple_of`; a
    width that is no multiple leaves one smaller last block. Whole blocks stay, and of every layer at least the first.

    - "layer": every layer keeps `round(n * (1 - fraction))` of its n units, moved to the nearest whole blocks
      (halfway: the larger).
    - "global": all layers together keep `round(total * (1 - fraction))`, moved to the nearest whole blocks (halfway:
      the larger). After the first block of every layer, blocks are taken by the highest mean score (ties: the earlier
      layer). When all blocks have the same size, no other choice of as many units in whole blocks has a higher sum of
      scores; with `multiple_of=1` this is the exact top-k with at least one unit per layer.

    EarlyBERT's released code keeps the scores strictly above a quantile, so that its counts depend on ties (when all
    scores are equal it prunes everything), and it may empty a layer when the heads are ranked globally. It cuts heads
    per layer and neurons globally, without blocks.

    Args:
        scores: one 1-D floating tensor per layer, higher = more important, on any devices.
        fraction: share of the units to prune, in [0, 1).
        scope: where units compete, within the "layer" or over all layers ("global").
        multiple_of: units per block; widths that are multiples of 16 multiply faster.

    Returns:
        bool masks, True = kept, of the shapes and on the devices of `scores`.

    Raises:
        ValueError: a number out of its range, an unknown scope, scores that are not 1-D, floating and finite, a layer
            without units, or a fraction that leaves a layer no unit ("layer") or fewer units than one block per layer
            needs ("global").
    """
    _check_request(fraction, scope, multiple_of)
    _check_scores(scores)
    counts_of = {"layer": _layer_counts, "global": _global_counts}[scope]
    return keep_counts(scores, counts_of(scores, fraction, multiple_of))


def keep_counts(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Keep the `counts[i]` highest scores of layer i; ties keep the lower index.

    Args:
        scores: one 1-D floating tensor per layer.
        counts: how many units each layer keeps, from 1 to its width.

    Returns:
        bool masks, True = kept, of the shapes and on the devices of `scores`.

    Raises:
        ValueError: lengths that differ, a count out of its range, scores that are not 1-D, floating and finite.
    """
    _check_scores(scores)
    if len(counts) != len(scores):
        raise ValueError(f"There must be one count per layer, got {len(counts)} for {len(scores)}: match them.")
    masks = []
    for position, (score, count) in enumerate(zip(scores, counts, strict=True)):
        if not 1 <= count <= score.numel():
            raise ValueError(
                f"`counts` must be in 1..{score.numel()}, the width, got {count} at position {position}: "
                "a layer keeps at least one unit."
            )
        order = score.detach().sort(descending=True, stable=True).indices
        mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        mask[order[:count]] = True
        masks.append(mask)
    return masks


def tied_at_cut(scores: Sequence[Tensor], masks: Sequence[Tensor], scope: Literal["layer", "global"]) -> bool:
    """Whether the cut goes through a crowd of equal scores, so that indices rather than scores decide who stays.

    Ask before a draw is trusted. AdamW's first step moves every coefficient by exactly its learning rate, up or down,
    so that about half of all scores are equal; before it all are. Such masks agree with each other by index, and look
    settled. Later ties are coincidences: fp32 coefficients near 1 fall on a grid, and a few of thousands may
    share the score at the cut. Hence the cut counts as tied only where the equal scores on both sides of it
    make up more than 1 % of the units that compete.

    Args:
        scores: one 1-D floating tensor per layer.
        masks: what `select_units` drew from them.
        scope: the one of the draw. Every layer is examined, and for "global" also all layers as one.

    Returns:
        False when nothing is pruned.

    Raises:
        ValueError: an unknown scope, masks that do not match the scores.
    """
    _check_scope(scope)
    _check_masks(scores, masks)
    groups = list(zip(scores, masks, strict=True))
    if scope == "global" and groups:
        groups.append((torch.cat([score.cpu() for score in scores]), torch.cat([mask.cpu() for mask in masks])))
    return any(_is_tied(score.detach(), mask) for score, mask in groups)


def _is_tied(score: Tensor, mask: Tensor) -> bool:
    if mask.all():
        return False
    at_cut = score == score[~mask].max()
    return bool((at_cut & mask).any()) and int(at_cut.count_nonzero()) > COINCIDENCE * score.numel()


def _layer_counts(scores: Sequence[Tensor], fraction: float, multiple_of: int) -> list[int]:
    counts = []
    for position, width in enumerate(score.numel() for score in scores):
        target = num_kept(width, fraction)
        if target == 0:
            raise ValueError(
                f"`fraction` must leave every layer at least one unit, got {fraction}, which would empty a layer: "
                f"position {position} with {width} units; lower it."
            )
        fewer = target // multiple_of * multiple_of
        more = min(fewer + multiple_of, width)
        counts.append(fewer if fewer and target - fewer < more - target else more)
    return counts


def _global_counts(scores: Sequence[Tensor], fraction: float, multiple_of: int) -> list[int]:
    counts = [min(multiple_of, score.numel()) for score in scores]
    target = num_kept(sum(score.numel() for score in scores), fraction)
    missing = target - sum(counts)
    if missing < 0:
        raise ValueError(
            f"`fraction` must leave every layer at least one block of `multiple_of={multiple_of}`, together "
            f"{sum(counts)} units, got {fraction}, which keeps {target} and would empty a layer: lower one of them."
        )
    blocks = []
    for layer, score in enumerate(scores):
        blocks += [(mean, layer, size) for mean, size in _blocks(score, multiple_of)[1:]]
    blocks.sort(key=lambda block: -block[0])
    for _, layer, size in blocks:
        if size > 2 * missing:  # the total is nearer to the target without this block
            break
        counts[layer] += size
        missing -= size
    return counts


def _blocks(score: Tensor, multiple_of: int) -> list[tuple[float, int]]:
    """(mean score, size) of each block of a layer, best first."""
    ordered = score.detach().double().sort(descending=True).values.tolist()
    blocks = [ordered[start : start + multiple_of] for start in range(0, len(ordered), multiple_of)]
    # Rounding must not lift the mean of a block above that of a better one of its layer, whence the running minimum.
    means = accumulate((math.fsum(block) / len(block) for block in blocks), min)
    return [(mean, len(block)) for mean, block in zip(means, blocks, strict=True)]


def _check_request(fraction: float, scope: str, multiple_of: int) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"`fraction` must be in [0, 1), got {fraction}: 0.4 prunes 40 % of the units.")
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be at least 1, got {multiple_of}: 1 chooses every unit by itself.")
    _check_scope(scope)


def _check_scope(scope: str) -> None:
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be one of 'layer', 'global', got {scope!r}: it says where units compete.")


def _check_scores(scores: Sequence[Tensor]) -> None:
    for position, score in enumerate(scores):
        if score.dim() != 1 or score.numel() == 0 or not score.is_floating_point():
            raise ValueError(
                f"`scores` must be 1-D, floating and hold at least one unit per layer, got {score.dtype} of shape "
                f"{tuple(score.shape)} at position {position}: pass one score per unit, and leave out empty layers."
            )
        if not score.isfinite().all():
            raise ValueError(
                f"`scores` must be finite, got {int((~score.isfinite()).count_nonzero())} NaN or infinite values at "
                f"position {position}: the search has diverged, lower its learning rate."
            )


def _check_masks(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    shapes = [tuple(score.shape) for score in scores]
    if [tuple(mask.shape) for mask in masks] != shapes or any(mask.dtype != torch.bool for mask in masks):
        found = [f"{mask.dtype} {tuple(mask.shape)}" for mask in masks]
        raise ValueError(f"`masks` must be bool of the shapes {shapes}, got {found}: pass what these scores drew.")
