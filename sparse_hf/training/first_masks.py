"""With which masks does a training under a fixed or growing sparsity begin?"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_hf.algorithms.bits import pack_bits
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import local_part, part_of, whole_of
from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import Site, find_sites
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.gradients import mean_gradients
from sparse_hf.training.zero_stepping import copy_masters_to_model


def masks_of_ticket(ticket: Ticket, model: nn.Module, check_base: bool) -> dict[str, Tensor]:
    """The ticket's masks, of sharded parameters this rank's parts, after names, shapes and base were found to fit."""
    ticket.check(model, check_base)
    return parts_of_ticket(ticket, model)


def parts_of_ticket(ticket: Ticket, model: nn.Module) -> dict[str, Tensor]:
    """Of a ticket's masks, what lies where this rank's parts of the parameters lie; one whole mask at a time."""
    parameters = named_canonical_parameters(model)
    return {name: part_of(ticket.mask(name), parameters[name]) for name in ticket.bits if name in parameters}


def ticket_of_parts(masks: Mapping[str, Tensor], model: nn.Module) -> Ticket:
    """The ticket of masks of which each rank has the parts of its parameters; one whole mask at a time.

    All ranks call it together where parameters are sharded, and all get the whole ticket, one bit per weight.
    """
    parameters = named_canonical_parameters(model)
    bits = {name: pack_bits(whole_of(mask, parameters[name])).cpu() for name, mask in masks.items()}
    return Ticket(bits, {name: whole_shape(parameters[name]) for name in masks})


@torch.no_grad()
def zero_pruned_by(ticket: Ticket, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """As `ticket.apply(model)`, also where parameters are sharded; all ranks together then.

    Args:
        optimizer: the Trainer's; if DeepSpeed steps masters, those are zeroed too.

    Raises:
        ValueError: names, shapes or base weights do not fit; the model is unchanged.
    """
    parameters = named_canonical_parameters(model)
    masks = masks_of_ticket(ticket, model, check_base=True)
    for name, mask in masks.items():
        part = local_part(parameters[name])
        zero_pruned_(part, sign_extended(mask.to(part.device)))
    copy_masters_to_model(optimizer, [parameters[name] for name in masks])


def parts_of(masks: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What of whole masks lies where this rank's parts of the model's parameters lie."""
    parameters = named_canonical_parameters(model)
    return {name: part_of(mask, parameters[name]) for name, mask in masks.items()}


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
