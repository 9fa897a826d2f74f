"""Runs under ZeRO-2 and ZeRO-3 go on with another number of processes, through DeepSpeed's universal format."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparse_hf.training import trainer as trainer_module
from sparse_hf.training.trainer import SparseTrainer
from training.tiny_training import Crash, CrashAt, assert_same
from training.two_processes import run_processes, without_compiling
from training.zero_processes import CASES, SAVING, plain_trainer, weights_of, zero_config


STAGES = (2, 3)
# Weight decay tells the groups of parameters apart.
OPTIONS = {**SAVING, "weight_decay": 0.1}


def trainer_in(folder: Path, stage: int, universal: bool = False, **options: object) -> SparseTrainer:
    without_compiling()
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    config = zero_config(stage) | ({"checkpoint": {"load_universal": True}} if universal else {})
    batch = 4 // int(os.environ["WORLD_SIZE"])
    return plain_trainer(folder, CASES["gradual"], batch, deepspeed=config, **OPTIONS, **options)


def stop(folder: str) -> None:
    """Until one step after the checkpoint of step 2."""
    for stage in STAGES:
        with pytest.raises(Crash):
            trainer_in(Path(folder) / f"moved-{stage}", stage, callbacks=[CrashAt(3)]).train()
    dist.barrier()
    dist.destroy_process_group()


def go_on(folder: str) -> None:
    """The stopped runs, and some that never were; a stock Trainer would step wrongly under ZeRO-3, and is refused."""
    found = {}
    for stage in STAGES:
        for name in (f"moved-{stage}", f"whole-{stage}"):
            moved = name.startswith("moved")
            trainer = trainer_in(Path(folder) / name, stage, universal=moved)
            trainer.train(resume_from_checkpoint=moved)
            found |= {f"{name}/weight/{key}": one for key, one in weights_of(trainer.model).items()}
            found |= {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}
    unmended = trainer_in(Path(folder) / "moved-3", 3, universal=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "put_right", lambda *_: None)
        with pytest.raises(ValueError, match="Resume by `SparseTrainer`"):
            unmended.train(resume_from_checkpoint=str(Path(folder) / "moved-3" / "checkpoint-2"))
    save_file(found, Path(folder) / "found.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, torch.Tensor]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'sparse_hf[deepspeed]'")
    folder = tmp_path_factory.mktemp("zero")
    run_processes(2, __name__, "stop", folder)
    for stage in STAGES:
        checkpoint = folder / f"moved-{stage}" / "checkpoint-2"
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        saved, universal = checkpoint / "global_step2", checkpoint / "global_step2_universal"
        places = ["--input_folder", saved, "--output_folder", universal]
        subprocess.run([*convert, *places], check=True, capture_output=True)
        (checkpoint / "latest").write_text(universal.name)
    run_processes(1, __name__, "go_on", folder)
    return load_file(folder / "found.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_from_two_to_one(found, stage):
    moved, whole = (
        {name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)}
        for prefix in (f"moved-{stage}/", f"whole-{stage}/")
    )
    masks = [name for name in whole if name.startswith("mask/")]
    assert_same({name: moved[name] for name in masks}, {name: whole[name] for name in masks})
    for name in set(whole) - set(masks):
        assert torch.allclose(moved[name], whole[name], rtol=0, atol=2e-5), name
