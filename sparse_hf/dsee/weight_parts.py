"""Which weights of an adapted matrix does this rank hold?

All of them, unless FSDP2 or ZeRO-3 has put the matrix away between uses; while its layer runs, it is whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparse_hf.algorithms.sharded_tensors import first_row, is_sharded, local_part, whole_of
from sparse_hf.algorithms.zero_partitions import partition_of, whole_shape


class WeightRun(NamedTuple):
    """Neighbouring weights of one matrix in flat order.

    Attributes:
        start: flat index of the first of them in the whole matrix.
        weights: 1-D, sharing memory with what the rank holds.
    """

    start: int
    weights: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same places of a whole tensor: 1-D, on the run's device."""
        return whole.reshape(-1)[self.start : self.start + self.weights.numel()].to(self.weights.device)


def is_split(tensor: Tensor) -> bool:
    """Whether the model holds a part of `tensor` here; under ZeRO-1 and 2 it holds the whole."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


@torch.no_grad()
def run_of(tensor: Tensor) -> WeightRun | None:
    """What this rank holds of a tensor that is split; None where it is whole."""
    if not is_split(tensor):
        return None
    if isinstance(tensor, DTensor):
        return WeightRun(first_row(tensor) * tensor.shape[1:].numel(), local_part(tensor).view(-1))
    partition = partition_of(tensor)
    return WeightRun(partition.start, partition.weights)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of the whole tensor."""
    return tuple(whole_shape(tensor))


def whole_from_run(values: Tensor, like: Tensor) -> Tensor:
    """The whole of what each rank gives for its run of `like`; all ranks call it together."""
    part = values.view(local_part(like).shape) if isinstance(like, DTensor) else values
    return whole_of(part, like)


def whole_copy(tensor: Tensor, *, stepped: bool = False) -> Tensor:
    """The tensor itself, or a whole copy where it is split; all ranks call it together.

    Args:
        stepped: under ZeRO-1 and 2 a copy too, of the fp32 masters and not of what the model computes with.
    """
    is_apart = is_sharded(tensor) if stepped else is_split(tensor)
    return whole_of(local_part(tensor), tensor) if is_apart else tensor


def bring_together_again(weight: Tensor) -> None:
    """After a part was written to: let a small matrix that ZeRO-3 keeps whole between uses show it.

    All ranks call it together.
    """
    if hasattr(weight, "ds_id") and weight.ds_status.name == "AVAILABLE":
        weight.partition()
        weight.all_gather()
