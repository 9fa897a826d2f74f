"""What of a ticket's masks belongs to the weights that this rank holds, and how does a ticket come of such parts?

One whole mask at a time is in memory, a byte per weight; a ticket holds one bit per weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import local_part, part_of, whole_of
from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.tickets.ticket import Ticket
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
