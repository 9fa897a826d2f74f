"""Which checkpoints count as whole: everything that a kill can leave behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sparse_hf.training.checkpoints import last_complete_checkpoint, steps_in_checkpoint


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, checkpoint / "model.safetensors")
    save_file({"weight": torch.ones(8, dtype=torch.uint8)}, checkpoint / "sparse_masks.safetensors")
    for name in FILES[1:4]:
        torch.save({"state": torch.arange(64.0)}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "loss": float("nan")}))
    return checkpoint


def test_the_newest_by_number(tmp_path):
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert steps_in_checkpoint(tmp_path / "checkpoint-9") == 9


def test_nothing_there(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_what_is_named_otherwise_is_passed_over(tmp_path):
    good = write_checkpoint(tmp_path, 2)
    for name in ("checkpoint-x", "checkpoint-3-old", "tmp-checkpoint-4", "checkpoint--5"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "checkpoint-6").write_text("a file")
    assert last_complete_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", FILES[1:])  # weights are the first file; without them, there is nothing else either
def test_a_missing_file(tmp_path, name):
    good, bad = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    (bad / name).unlink()
    assert last_complete_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", [*FILES, "sparse_masks.safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_off(tmp_path, name, fraction):
    good, bad = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    content = (bad / name).read_bytes()
    (bad / name).write_bytes(content[: int(len(content) * fraction)])
    assert last_complete_checkpoint(tmp_path) == good


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"global_step": "2"}', '{"global_step": 2'])
def test_a_state_that_says_no_step(tmp_path, content):
    bad = write_checkpoint(tmp_path, 2)
    (bad / "trainer_state.json").write_text(content)
    assert last_complete_checkpoint(tmp_path) is None


def test_several_processes_have_several_random_states(tmp_path):
    good = write_checkpoint(tmp_path, 2)
    (good / "rng_state.pth").rename(good / "rng_state_0.pth")
    assert last_complete_checkpoint(tmp_path) == good


def test_sharded_weights(tmp_path):
    good = write_checkpoint(tmp_path, 2)
    (good / "model.safetensors").rename(good / "model-00001-of-00002.safetensors")
    shutil.copy(good / "model-00001-of-00002.safetensors", good / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    assert last_complete_checkpoint(tmp_path) == good
