"""Which weights of a parameter does DeepSpeed ZeRO leave to this rank, and where?

ZeRO cuts the flat (row-major) order of a parameter into runs of neighbouring weights, one for each rank or none. The
optimizer steps a rank's runs in fp32, many parameters joined in one flat tensor; these masters are the weights here.
What the model computes with are copies of them in the model's dtype: whole on every rank in stages 1 and 2, the same
runs in stage 3, where the parameter itself is an empty tensor between uses. DeepSpeed writes all of this on the
parameters, so nothing of DeepSpeed is imported.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """One parameter's run of weights on this rank.

    Attributes:
        start: flat index in the whole parameter of the run's first weight.
        weights: the run, 1-D, sharing memory with what the optimizer steps; empty if this rank has none.
    """

    start: int
    weights: Tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO has cut `tensor`. Frozen parameters are cut in stage 3 only."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor, also where ZeRO-3 has put it away and left an empty one."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def partition_of(parameter: Tensor) -> Partition:
    """This rank's run of a parameter that `is_partitioned`."""
    return _stage_3(parameter) if hasattr(parameter, "ds_id") else _stage_1_or_2(parameter)


def place_in(flat: Tensor, run: Tensor) -> slice | None:
    """Where in a flat tensor a run of weights that shares its memory lies; None if it does not, or is empty."""
    begin = (run.data_ptr() - flat.data_ptr()) // flat.element_size()
    inside = run.numel() and run.device == flat.device and 0 <= begin <= flat.numel() - run.numel()
    return slice(begin, begin + run.numel()) if inside else None


def group_of(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks among which a parameter that `is_partitioned` is cut."""
    return parameter.ds_process_group if hasattr(parameter, "ds_id") else parameter._dp_group


def _stage_1_or_2(parameter: Tensor) -> Partition:
    mapping = parameter._hp_mapping
    if mapping is None:  # other ranks have all of it
        return Partition(0, torch.empty(0, device=parameter.device))
    return Partition(mapping.lp_fragment_address.start, mapping.hp_fragment.detach())


def _stage_3(parameter: Tensor) -> Partition:
    size = parameter.ds_tensor.ds_numel  # all ranks' runs are as long, the last ones padded
    start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    numel = min(size, parameter.ds_numel - start)
    zero = getattr(parameter, "_z3_optimizer", None)  # None until there is an optimizer
    if zero is None or not parameter.requires_grad:
        return Partition(start, parameter.ds_tensor.detach()[:numel])
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    return Partition(start, zero.fp32_partitioned_groups_flat[group].detach()[offset : offset + numel])
