"""With which masks does a training under a fixed or growing sparsity begin?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import Site, find_sites
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.gradients import mean_gradients
from sparse_hf.training.ticket_parts import masks_of_ticket


def draw_at(
    config: StaticSparsityConfig | GradualPruningConfig,
    model: nn.Module,
    sparsity: float,
    *,
    step: int = 0,
    previous: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draw masks at `sparsity` by the config's score and budget; random choices come from (seed, step)."""
    return draw_masks(
        find_sites(model, config.include, config.exclude),
        named_canonical_parameters(model),
        sparsity,
        score=config.score,
        budget=config.budget,
        previous=previous,
        gradients=gradients,
        generator=seeded(config.seed, step),
    )


def static_masks(config: StaticSparsityConfig, model: nn.Module, dataloader: DataLoader | None) -> dict[str, Tensor]:
    """The one mask of a `StaticSparsityConfig`."""
    if config.ticket is not None:
        return masks_of_ticket(Ticket.from_pretrained(config.ticket), model, config.check_base)
    gradients = None
    if config.score == "gradient":
        sites = find_sites(model, config.include, config.exclude)
        gradients = site_gradients(model, sites, dataloader, config.score_batches, config.seed)
    return draw_at(config, model, config.sparsity, gradients=gradients)


def site_gradients(
    model: nn.Module, sites: Sequence[Site], dataloader: DataLoader, batches: int, seed: int
) -> dict[str, Tensor]:
    """Mean loss gradients of the parameters that hold the sites, by canonical name."""
    parameters = named_canonical_parameters(model)
    wanted = {site.parameter: parameters[site.parameter] for site in sites}
    return mean_gradients(model, wanted, dataloader, batches, seed)


def seeded(seed: int, step: int) -> torch.Generator:
    """A generator of its own for each (seed, step), so that nothing of it has to be checkpointed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
