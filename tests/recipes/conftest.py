"""A tiny model and task on disk, and a recipe run by the command a user types."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tiny_folder import save_tiny_model, save_tiny_task


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    train, validation = save_tiny_task(root / "task")
    return {"model": save_tiny_model(root / "model"), "train": train, "validation": validation, "root": root}


@pytest.fixture
def run(request, places, monkeypatch):
    """`run(name, *options)` runs the module's RECIPE for STEPS into a folder of that name; returns the evaluation."""

    def go(name: str, *more: str) -> dict:
        recipe, folder = Path(__file__).parents[2] / "recipes" / request.module.RECIPE, places["root"] / name
        words = ["--model_name_or_path", places["model"], "--train_file", places["train"]]
        words += ["--validation_file", places["validation"], "--output_dir", folder]
        words += ["--max_steps", request.module.STEPS, "--per_device_train_batch_size", "8", "--report_to", "none"]
        words += ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "epoch"]
        monkeypatch.setattr(sys, "argv", [str(recipe), *map(str, words), *more])
        runpy.run_path(str(recipe), run_name="__main__")
        results = folder / "eval_results.json"
        return json.loads(results.read_text()) if results.is_file() else {}

    return go
