"""Four processes, of which each two share the same experts, draw the masks of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from sparse_hf.algorithms.sharded_tensors import first_row, local_part, part_of, sum_over_ranks, whole_of
from sparse_hf.anatomy.sites import Site
from sparse_hf.tickets.draw import draw_masks
from training.tiny_training import assert_same
from training.two_processes import found_by_both, leave_found, run_processes


EXPERTS = (4, 6, 2, 9)  # of which FSDP2 cuts those of one rank evenly, unevenly, into one and nothing


def weights() -> dict[str, Tensor]:
    """A matrix and the experts of four layers, of so few magnitudes that most tie."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"dense": (7, 6)} | {f"experts-{count}": (count, 5, 4) for count in EXPERTS}
    return {name: torch.randint(-4, 5, shape, generator=generator).float() for name, shape in shapes.items()}


def sites() -> list[Site]:
    experts = [Site(f"experts-{n}.{i}", f"experts-{n}", i, (5, 4), False) for n in EXPERTS for i in range(n)]
    return [Site("dense", "dense", None, (7, 6), False), *experts]


def sharded() -> dict[str, DTensor]:
    """As Transformers does it: experts over `ep`, what a rank has of them over `efsdp`, all else over all ranks."""
    all_ranks = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    found = {}
    for name, whole in weights().items():
        module, by_expert = nn.Module(), name != "dense"
        module.weight = nn.Parameter(distribute_tensor(whole, mesh["ep"], [Shard(0)]) if by_expert else whole)
        found[name] = fully_shard(module, mesh=mesh["efsdp"] if by_expert else all_ranks).weight
    return found


def run_one_process(folder: str) -> None:
    """What each of the four processes does."""
    dist.init_process_group("gloo")
    parameters, wholes, found = sharded(), weights(), {}
    for name, one in parameters.items():
        local, whole = local_part(one), wholes[name]
        assert torch.equal(whole[first_row(one) :][: len(local)], local), name
        assert torch.equal(part_of(whole, one), local), name
        assert torch.equal(whole_of(local, one), whole), name
    assert parameters["experts-2"].device_mesh.ndim == 2
    held = torch.tensor([sum(local_part(one).numel() for one in parameters.values())])
    assert int(sum_over_ranks(parameters.values())(held)) == sum(one.numel() for one in wholes.values())
    for score in ("magnitude", "random"):
        generator = torch.Generator().manual_seed(1)
        masks = draw_masks(sites(), parameters, 0.55, score=score, generator=generator)
        found |= {f"{score}/mask/{name}": whole_of(mask, parameters[name]) for name, mask in masks.items()}
    mesh = parameters["dense"].device_mesh
    by_column = distribute_tensor(wholes["dense"], mesh, [Shard(1)])
    with pytest.raises(ValueError, match="must be split along their first axis"):
        draw_masks(sites(), parameters | {"dense": by_column}, 0.5)
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "half"))["half"]
    halves = distribute_tensor(wholes["dense"], pair, [Shard(0)])
    with pytest.raises(ValueError, match="must each be split over all 4 ranks"):
        draw_masks(sites(), parameters | {"dense": halves}, 0.5)
    with pytest.raises(ValueError, match="got `dense` whole beside sharded ones"):
        draw_masks(sites(), parameters | {"dense": wholes["dense"]}, 0.5)
    leave_found(found, Path(folder))


@pytest.mark.slow
def test_masks_are_those_of_one_process(tmp_path):
    run_processes(4, __name__, "run_one_process", tmp_path)
    for score, found in found_by_both(tmp_path).items():
        generator = torch.Generator().manual_seed(1)
        masks = draw_masks(sites(), weights(), 0.55, score=score, generator=generator)
        assert_same(found["mask"], masks)
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.55 * (42 + 20 * sum(EXPERTS)))
