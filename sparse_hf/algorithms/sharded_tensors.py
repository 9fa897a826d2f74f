"""What of a sharded tensor does this rank hold, and how do all ranks come to one number or one whole?

Sharded means a DTensor whose first axis is spread over the ranks of one group, as FSDP2 leaves parameters, gradients
and moments. For a plain tensor everything here is the tensor itself, and nothing is communicated.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of `tensor`."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, a tensor that shares its memory; neighbouring entries along the first axis, or none."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """The index along the first axis of the whole at which this rank's part begins."""
    if not is_sharded(tensor):
        return 0
    # DTensor cuts as torch.chunk does: every rank but the last ones holds the rounded-up share.
    share = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(share * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole`, which every rank has, that lies where this rank's part of `like` lies."""
    if not is_sharded(like):
        return whole.to(like.device)
    spread = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return spread.to_local()


@torch.no_grad()
def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank gives the part that lies where its part of `like` lies.

    All ranks call it together, and all get the result: a copy where `like` is sharded.
    """
    if not is_sharded(like):
        return part
    # As bytes, since not every backend sends booleans.
    sent = part.to(torch.uint8) if part.dtype == torch.bool else part
    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(sent, like.device_mesh, like.placements, **options).full_tensor().to(part.dtype)


def sum_over_ranks(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that adds up an int64 CPU tensor over the ranks which together hold each of `tensors` once.

    Raises:
        ValueError: they are spread in other ways than along the first axis over one and the same group of ranks.
    """
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return lambda counts: counts
    mesh = sharded[0].device_mesh
    for tensor in sharded:
        if tensor.device_mesh != mesh or mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
            raise ValueError(
                "Sharded weights must be split along their first axis over one group of ranks, as plain FSDP2 does, "
                f"got {tensor.placements} on {tensor.device_mesh}. Leave out tensor parallelism and HSDP."
            )

    def add(counts: Tensor) -> Tensor:
        moved = counts.to(mesh.device_type)
        dist.all_reduce(moved, group=mesh.get_group())
        return moved.cpu()

    return add
