"""Prune a model once, in place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import find_sites
from sparse_hf.tickets.configs import Budget, Score
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.ticket import Ticket, origin_of


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    score: Score = "magnitude",
    budget: Budget = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Ticket:
    """Set the least important weights of `model` to zero and return the ticket that says which.

    Args:
        sparsity: fraction of the prunable weights that become zero, in [0, 1); met exactly.
        score: "magnitude" |w|, "gradient" |w * gradient|, or "random".
        budget: "global", "uniform", "erdos_renyi" or "erdos_renyi_kernel".
        include, exclude: patterns of matrix names, see `find_sites`.
        gradients: by canonical parameter name, for score="gradient"; default the parameters' `.grad`.
        seed: of score="random".

    Raises:
        ValueError: nothing to prune, a sparsity out of range, NaN weights; the model is unchanged.
    """
    sites = find_sites(model, include, exclude)
    parameters = named_canonical_parameters(model)
    if score == "gradient" and gradients is None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        missing = [site.parameter for site in sites if site.parameter not in gradients]
        if missing:
            raise ValueError(f"score='gradient' needs gradients, `{missing[0]}` has none. Run a backward pass first.")
    generator = torch.Generator().manual_seed(seed)
    masks = draw_masks(
        sites, parameters, sparsity, score=score, budget=budget, gradients=gradients, generator=generator
    )
    config = {"sparsity": sparsity, "score": score, "budget": budget, "seed": seed}
    ticket = Ticket.from_masks(masks, origin_of(model, method="one_shot", config=config))
    fingerprint = base_fingerprint(parameters, ticket.bits)
    ticket.origin = origin_of(model, method="one_shot", config=config, base_fingerprint=fingerprint)
    return ticket.apply(model, check_base=False) and ticket
