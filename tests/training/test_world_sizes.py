"""A run that was stopped goes on with another number of processes: same masks, same weights up to rounding."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from training.test_fsdp2 import CASES, sharded_trainer, trainer_of, whole_weights
from training.tiny_training import Crash, CrashAt, assert_same
from training.two_processes import run_processes


CONFIG = CASES["gradual"]
SAVING = {"save_strategy": "steps", "save_steps": 2}
BATCH = 4  # rows of a step, over all processes


def plain(folder: Path, **options: object):
    return trainer_of(folder, CONFIG, BATCH // int(os.environ.get("WORLD_SIZE", "1")), **SAVING, **options)


def sharded(state: str):
    def make(folder: Path, **options: object):
        batch = BATCH // int(os.environ["WORLD_SIZE"])
        return sharded_trainer(folder, CONFIG, state, batch=batch, **SAVING, **options)

    return make


KINDS = {"ddp": plain, "fsdp2": sharded("SHARDED_STATE_DICT"), "fsdp2-full": sharded("FULL_STATE_DICT")}


def weights_of(trainer) -> dict[str, torch.Tensor]:
    if trainer.is_fsdp_enabled:
        return whole_weights(trainer)
    return {name: one.detach().clone() for name, one in named_canonical_parameters(trainer.model).items()}


def stop(folder: str) -> None:
    """Every kind of training until it is killed at step 3, one step after its last checkpoint."""
    for name, make in KINDS.items():
        with pytest.raises(Crash):
            make(Path(folder) / name, callbacks=[CrashAt(3)]).train()
        dist.barrier()
    dist.destroy_process_group()


def go_on(folder: str) -> None:
    """Resume every kind, and write down what it comes to."""
    found = {}
    for name, make in KINDS.items():
        trainer = make(Path(folder) / name)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        found |= {f"{name}/weight/{key}": one for key, one in weights_of(trainer).items()}
        found |= {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}
    if os.environ["RANK"] == "0":
        save_file(found, Path(folder) / "found.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["from two to one", "from one to two"])
def found(request, tmp_path_factory):
    """Weights and masks at the end of trainings that began with one number of processes and ended with another."""
    folder = tmp_path_factory.mktemp("sizes")
    before, after = request.param
    run_processes(before, __name__, "stop", folder)
    run_processes(after, __name__, "go_on", folder)
    return load_file(folder / "found.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training by one process that is never stopped."""
    trainer = trainer_of(tmp_path_factory.mktemp("alone"), CONFIG, BATCH)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_to_what_one_process_comes_to(found, alone, kind):
    masks = {name.split("/", 2)[2]: one for name, one in found.items() if name.startswith(f"{kind}/mask/")}
    assert_same(masks, alone.ticket.masks())
    for name, expected in named_canonical_parameters(alone.model).items():
        weight = found[f"{kind}/weight/{name}"]
        assert torch.allclose(weight, expected.detach(), rtol=0, atol=2e-5), name
        if name in masks:
            assert not weight[~masks[name]].any(), name
