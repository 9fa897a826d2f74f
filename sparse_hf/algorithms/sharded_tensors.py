"""What of a sharded tensor does this rank hold, and how do all ranks come to one number or one whole?

Sharded means a DTensor whose first axis is spread over ranks, as FSDP2 leaves parameters, gradients and moments and
Transformers' expert parallelism those of experts, or a parameter that DeepSpeed ZeRO has cut into flat runs. For a
plain tensor everything here is the tensor itself, and nothing is communicated.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from sparse_hf.algorithms.joint_sums import alone
from sparse_hf.algorithms.zero_partitions import group_of, is_partitioned, partition_of, whole_shape


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of `tensor`."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put whole parameters away that it left in the model after an evaluation. Nothing is sent."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, a tensor that shares its memory: neighbouring entries, or none.

    Of a DTensor neighbours along the first axis; of a parameter under ZeRO a 1-D run of its fp32 masters.
    """
    if is_partitioned(tensor):
        return partition_of(tensor).weights
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """The index along the first axis of the whole at which this rank's part of a DTensor or plain tensor begins."""
    return _rows(tensor).start if is_sharded(tensor) else 0


def _rows(tensor: DTensor) -> slice:
    """What this rank holds of the first axis."""
    mesh, start, count = tensor.device_mesh, 0, tensor.shape[0]
    for axis in _cutting_axes(tensor):
        # DTensor cuts as torch.chunk does: every rank but the last ones holds the rounded-up share.
        share = -(-count // mesh.size(axis))
        skipped = min(share * mesh.get_local_rank(axis), count)
        start, count = start + skipped, min(share, count - skipped)
    return slice(start, start + count)


def _cutting_axes(tensor: DTensor) -> tuple[int, ...]:
    """The axes of the mesh, in the order in which they cut the first axis of the tensor.

    Raises:
        ValueError: it is spread otherwise.
    """
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    if placements == (Shard(0),):
        return (0,)
    # FSDP2 splits the experts of one rank once more, among those that hold the same ones.
    if mesh.ndim == 2 and placements == (_StridedShard(0, split_factor=mesh.size(1)), Shard(0)):
        return (1, 0)
    raise ValueError(
        "Sharded weights must be split along their first axis, as plain FSDP2 and Transformers' expert parallelism "
        f"do, got {placements} on {mesh}. Leave out tensor parallelism and HSDP."
    )


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole`, which every rank has, that lies where this rank's part of `like` lies.

    A copy where `like` is sharded, so that it does not keep the whole in memory.
    """
    if is_partitioned(like):
        run = partition_of(like)
        return whole.reshape(-1)[run.start : run.start + run.weights.numel()].to(run.weights.device, copy=True)
    if not is_sharded(like):
        return whole.to(like.device)
    return whole[_rows(like)].to(like.device, copy=True)


@torch.no_grad()
def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank gives the part that lies where its part of `like` lies.

    All ranks call it together, and all get the result: a copy where `like` is sharded.
    """
    if is_partitioned(like):
        return _join_runs(part, like)
    if not is_sharded(like):
        return part
    # As bytes, since not every backend sends booleans.
    sent = part.to(torch.uint8) if part.dtype == torch.bool else part
    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(sent, like.device_mesh, like.placements, **options).full_tensor().to(part.dtype)


def _join_runs(part: Tensor, like: Tensor) -> Tensor:
    """Bytes are added up, to which only one rank gives other than zeros: bit-exact, and runs may differ in length."""
    shape, group = whole_shape(like), group_of(like)
    joined = torch.zeros(torch.Size(shape).numel(), dtype=part.dtype, device=_sending_device(group))
    start = partition_of(like).start
    joined[start : start + part.numel()] = part
    dist.all_reduce(joined.view(torch.uint8), group=group)
    return joined.view(shape)


def _sending_device(group: dist.ProcessGroup) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if dist.get_backend(group) == "gloo" or accelerator is None else accelerator


def sum_over_ranks(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that adds up an int64 CPU tensor over the ranks which together hold each of `tensors` once.

    Raises:
        ValueError: they are spread in other ways than along the first axis, over one and the same group of ranks or
            each over all ranks, or by ZeRO over all ranks.
    """
    tensors = list(tensors)
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return alone
    if any(map(is_partitioned, sharded)):
        group = _zero_group(tensors)
        device = _sending_device(group)
    else:
        group, device = _group_of_meshes(sharded), sharded[0].device_mesh.device_type

    def add(counts: Tensor) -> Tensor:
        moved = counts.to(device, copy=True)
        dist.all_reduce(moved, group=group)
        return moved.cpu()

    return add


def _group_of_meshes(sharded: list[DTensor]) -> dist.ProcessGroup:
    for tensor in sharded:
        _cutting_axes(tensor)  # is known
    meshes = [tensor.device_mesh for tensor in sharded]
    if meshes[0].ndim == 1 and all(mesh == meshes[0] for mesh in meshes):
        return meshes[0].get_group()
    for mesh in meshes:
        if mesh.size() != dist.get_world_size():
            raise ValueError(
                f"Weights on different meshes must each be split over all {dist.get_world_size()} ranks, got {mesh}. "
                "Leave out pipeline parallelism and HSDP."
            )
    return dist.group.WORLD


def _zero_group(tensors: list[Tensor]) -> dist.ProcessGroup:
    if not all(map(is_partitioned, tensors)):
        raise ValueError(
            "Every masked weight must be trained under ZeRO-1 and ZeRO-2, which leave frozen ones whole on each rank: "
            "train it, or use ZeRO-3."
        )
    for tensor in tensors:
        size = dist.get_world_size(group_of(tensor))
        if size != dist.get_world_size():
            raise ValueError(
                f"ZeRO must split weights over all {dist.get_world_size()} ranks, got groups of {size}. Leave out "
                "MiCS, tensor and expert parallelism."
            )
    return group_of(tensors[0])
