"""Prune a model once, in place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import find_sites
from sparse_hf.tickets.configs import Budget, Score
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.origin import origin_of
from sparse_hf.tickets.ticket import Ticket


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
        ValueError: nothing to prune, a sparsity out of range, unknown score or budget, NaN or infinite scores, missing
            gradients; the model is unchanged.
    """
    sites = find_sites(model, include, exclude)
    parameters = named_canonical_parameters(model)
    if score == "gradient" and gradients is None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    generator = torch.Generator().manual_seed(seed)
    masks = draw_masks(
        sites, parameters, sparsity, score=score, budget=budget, gradients=gradients, generator=generator
    )
    config = {"sparsity": sparsity, "score": score, "budget": budget, "seed": seed}
    ticket = Ticket.from_masks(masks, origin_of(model, method="one_shot", config=config))
    ticket.origin = replace(ticket.origin, base_fingerprint=base_fingerprint(parameters, ticket.bits))
    ticket.apply(model, check_base=False)
    return ticket
