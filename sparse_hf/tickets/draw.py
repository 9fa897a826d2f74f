"""Which weights of a model stay at a given sparsity: one draw = score x budget."""

import logging
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
from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.anatomy.sites import Site
from sparse_hf.tickets.config_checks import check_choice
from sparse_hf.tickets.configs import Budget, Score


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
        parameters: the parameters that store them, by canonical name.
        sparsity: fraction of zeros over all sites together, in [0, 1).
        previous: earlier masks; what they pruned stays pruned (nested masks).
        gradients: loss gradients by parameter name, for score="gradient".
        generator: for score="random".
        min_kept_per_site: no matrix is left with fewer weights; 0 allows empty matrices.

    Returns:
        Bool masks (True = kept) of the parameters' shapes, by canonical parameter name.

    Raises:
        ValueError: unknown score or budget, NaN or infinite scores, a missing gradient, or more zeros asked for than
            can be had.
    """
    check_choice("score", score, Score)
    check_choice("budget", budget, Budget)
    weights = [site.part(parameters[site.parameter].detach()) for site in sites]
    scores = _scores(sites, weights, score, gradients, generator)
    candidates = None if previous is None else [site.part(previous[site.parameter]) for site in sites]
    keep = num_kept(sum(weight.numel() for weight in weights), sparsity)
    names = [site.name for site in sites]
    options = {"min_per_tensor": min_kept_per_site, "absolute": score == "magnitude"}
    if budget == "global":
        kept = keep_largest(scores, keep, candidates=candidates, names=names, **options)
    else:
        capacities = [int(part.sum()) for part in candidates] if candidates else [weight.numel() for weight in weights]
        counts = _counts([site.shape for site in sites], keep, capacities, budget)
        kept = [
            keep_largest(
                [scores[i]],
                count,
                candidates=None if candidates is None else [candidates[i]],
                names=[names[i]],
                **options,
            )[0]
            for i, count in enumerate(counts)
        ]
    _warn_of_collapse(names, kept)
    return join_sites(sites, kept, parameters)


def _warn_of_collapse(names: Sequence[str], kept: Sequence[Tensor]) -> None:
    """One threshold for all empties matrices whose weights are small by scale; what needs them then cannot learn."""
    density = sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)
    densities = {name: int(mask.sum()) / mask.numel() for name, mask in zip(names, kept, strict=True)}
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
    sites: Sequence[Site],
    weights: Sequence[Tensor],
    score: Score,
    gradients: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    if score == "magnitude":
        return list(weights)  # ranked by absolute value without a copy
    if score == "random":
        if generator is None:
            raise ValueError("score='random' needs a `generator`, got None. Seed one with `torch.Generator()`.")
        return [random_scores(weight, generator) for weight in weights]
    for site in sites:
        if site.parameter not in (gradients or {}):
            raise ValueError(
                f"score='gradient' needs gradients, `{site.parameter}` has none. Run a backward pass first."
            )
    return [
        gradient_scores(weight, site.part(gradients[site.parameter]))
        for site, weight in zip(sites, weights, strict=True)
    ]


def _counts(shapes: list[tuple[int, int]], keep: int, capacities: list[int], budget: Budget) -> list[int]:
    if budget == "uniform":
        return uniform_budget([rows * columns for rows, columns in shapes], keep, capacities)
    counter = {"erdos_renyi": erdos_renyi_budget, "erdos_renyi_kernel": erdos_renyi_kernel_budget}[budget]
    return counter(shapes, keep, capacities)


def join_sites(sites: Sequence[Site], kept: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by parameter from one mask per site: those of the experts of a layer are joined."""
    masks: dict[str, Tensor] = {}
    for site, mask in zip(sites, kept, strict=True):
        if site.expert is None:
            masks[site.parameter] = mask
            continue
        parameter = parameters[site.parameter]
        # Experts that are no site (excluded by a pattern) stay dense.
        whole = masks.setdefault(
            site.parameter, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        )
        site.part(whole).copy_(mask)
    return masks
