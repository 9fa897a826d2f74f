"""Which weights of a model stay at a given sparsity: one draw = score x budget."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_hf.algorithms.budgets import (
    erdos_renyi_budget,
    erdos_renyi_kernel_budget,
    num_kept,
    uniform_budget,
)
from sparse_hf.algorithms.scores import gradient_scores, random_scores
from sparse_hf.algorithms.selection import keep_largest, keep_largest_each
from sparse_hf.anatomy.sites import Site
from sparse_hf.tickets.config_checks import check_choice
from sparse_hf.tickets.configs import Budget, Score
from sparse_hf.tickets.site_pieces import SitePieces, pieces_of


logger = logging.getLogger(__name__)

# A matrix whose density is below this share of the whole draw's is as good as cut off.
COLLAPSED = 0.05


@torch.no_grad()
def draw_masks(
    sites: Sequence[Site],
    parameters: Mapping[str, Tensor],
    sparsity: float,
    *,
    score: Score = "magnitude",
    budget: Budget = "global",
    previous: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    min_kept_per_site: int = 1,
) -> dict[str, Tensor]:
    """Masks at exactly `sparsity` of all weights of the sites.

    Args:
        sites: the matrices to prune.
        parameters: the parameters that store them, by canonical name; FSDP2's shards too.
        sparsity: fraction of zeros over all sites together, in [0, 1).
        previous: earlier masks, such as this function returned; what they pruned stays pruned (nested masks).
        gradients: loss gradients by parameter name, for score="gradient".
        generator: for score="random".
        min_kept_per_site: no matrix is left with fewer weights; 0 allows empty matrices.

    Returns:
        Bool masks (True = kept) of the parameters' shapes, by canonical parameter name; of sharded parameters, this
        rank's parts of the masks that one process would draw. All ranks call it together then.

    Raises:
        ValueError: unknown score or budget, NaN or infinite scores, a missing gradient, or more zeros asked for than
            can be had.
    """
    check_choice("score", score, Score)
    check_choice("budget", budget, Budget)
    held = pieces_of(sites, parameters)
    scores = _scores(held, parameters, score, gradients, generator)
    candidates = None if previous is None else held.take(previous)
    keep = num_kept(sum(held.layout.numels), sparsity)
    options = {
        "candidates": candidates,
        "min_per_tensor": min_kept_per_site,
        "absolute": score == "magnitude",
        "names": [site.name for site in sites],
        "shards": held.layout,
    }
    if budget == "global":
        kept = keep_largest(scores, keep, **options)
    else:
        capacities = held.totals(candidates) if candidates is not None else held.layout.numels
        counts = _counts([site.shape for site in sites], keep, list(capacities), budget)
        kept = keep_largest_each(scores, counts, **options)
    _warn_of_collapse(held, kept)
    return held.join(kept, parameters)


def _warn_of_collapse(held: SitePieces, kept: Sequence[Tensor]) -> None:
    """One threshold for all empties matrices whose weights are small by scale; what needs them then cannot learn."""
    counts, numels = held.totals(kept), held.layout.numels
    density = sum(counts) / sum(numels)
    found = zip(held.sites, counts, numels, strict=True)
    densities = {site.name: count / numel for site, count, numel in found}
    collapsed = [name for name, one in densities.items() if one < COLLAPSED * density]
    if collapsed:
        logger.warning(
            "Layer collapse: `%s`%s keeps %.2g of its weights where %.2g stay over all. Leave it dense by `exclude`, "
            "or fix a density per matrix by `budget`.",
            collapsed[0],
            f" (and {len(collapsed) - 1} more)" if len(collapsed) > 1 else "",
            densities[collapsed[0]],
            density,
        )


def _scores(
    held: SitePieces,
    parameters: Mapping[str, Tensor],
    score: Score,
    gradients: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    weights = held.take(parameters)
    if score == "magnitude":
        return weights  # ranked by absolute value without a copy
    if score == "random":
        return _random_scores(held, weights, generator)
    for site in held.sites:
        if site.parameter not in (gradients or {}):
            raise ValueError(
                f"score='gradient' needs gradients, `{site.parameter}` has none. Run a backward pass first."
            )
    return [gradient_scores(*both) for both in zip(weights, held.take(gradients), strict=True)]


def _random_scores(held: SitePieces, weights: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Of every site the numbers that one process would draw, of which this rank keeps its own."""
    if generator is None:
        raise ValueError("score='random' needs a `generator`, got None. Seed one with `torch.Generator()`.")
    scores = []
    for position, site in enumerate(held.sites):
        drawn = random_scores(torch.empty(math.prod(site.shape)), generator)
        if position in held.numbers:
            weight, start = weights[len(scores)], held.pieces[len(scores)].start
            scores.append(drawn[start : start + weight.numel()].view(weight.shape).to(weight.device))
    return scores


def _counts(shapes: list[tuple[int, int]], keep: int, capacities: list[int], budget: Budget) -> list[int]:
    if budget == "uniform":
        return uniform_budget([rows * columns for rows, columns in shapes], keep, capacities)
    counter = {"erdos_renyi": erdos_renyi_budget, "erdos_renyi_kernel": erdos_renyi_kernel_budget}[budget]
    return counter(shapes, keep, capacities)
