"""A run under ZeRO-2 goes on with another number of processes, through DeepSpeed's universal format."""

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

from training.tiny_training import Crash, CrashAt, assert_same
from training.two_processes import run_processes, without_compiling
from training.zero_processes import CASES, SAVING, plain_trainer, weights_of, zero_config


def trainer_in(folder: Path, universal: bool = False, **options: object):
    without_compiling()
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    config = zero_config(2) | ({"checkpoint": {"load_universal": True}} if universal else {})
    batch = 4 // int(os.environ["WORLD_SIZE"])
    return plain_trainer(folder, CASES["gradual"], batch, deepspeed=config, **SAVING, **options)


def stop(folder: str) -> None:
    """Until one step after the checkpoint of step 2."""
    with pytest.raises(Crash):
        trainer_in(Path(folder) / "moved", callbacks=[CrashAt(3)]).train()
    dist.barrier()
    dist.destroy_process_group()


def go_on(folder: str) -> None:
    """The stopped run, and one that never was."""
    found = {}
    for name in ("moved", "whole"):
        moved = name == "moved"
        trainer = trainer_in(Path(folder) / name, universal=moved)
        trainer.train(resume_from_checkpoint=moved)
        found |= {f"{name}/weight/{key}": one for key, one in weights_of(trainer.model).items()}
        found |= {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}
    save_file(found, Path(folder) / "found.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_from_two_to_one(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'sparse_hf[deepspeed]'")
    run_processes(2, __name__, "stop", tmp_path)
    checkpoint = tmp_path / "moved/checkpoint-2"
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    places = ["--input_folder", checkpoint / "global_step2", "--output_folder", checkpoint / "global_step2_universal"]
    subprocess.run([*convert, *places], check=True, capture_output=True)
    (checkpoint / "latest").write_text("global_step2_universal")
    run_processes(1, __name__, "go_on", tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    names = [name.removeprefix("whole/") for name in found if name.startswith("whole/")]
    masks = [name for name in names if name.startswith("mask/")]
    assert_same({name: found[f"moved/{name}"] for name in masks}, {name: found[f"whole/{name}"] for name in masks})
    for name in set(names) - set(masks):
        assert torch.allclose(found[f"moved/{name}"], found[f"whole/{name}"], rtol=0, atol=2e-5), name
