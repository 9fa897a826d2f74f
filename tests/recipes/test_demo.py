"""The demo leaves what it promises; on a tiny model and tiny data."""

import runpy
import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from sparse_hf import Ticket
from tiny_folder import save_tiny_model, save_tiny_task


def test_the_demo_prints_its_table_and_leaves_model_ticket_and_picture(tmp_path, monkeypatch, capsys):
    train, validation = save_tiny_task(tmp_path / "task")
    recipe = Path(__file__).parents[2] / "recipes" / "demo.py"
    words = ["--model_name_or_path", save_tiny_model(tmp_path / "model"), "--train_file", train]
    words += ["--validation_file", validation, "--output_dir", tmp_path / "out", "--rounds", "2", "--sparsity", "0.5"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *map(str, words)])
    monkeypatch.setenv("COLUMNS", "160")
    runpy.run_path(str(recipe), run_name="__main__")
    printed = capsys.readouterr().out
    for text in ("dense", "ticket (IMP)", "one-shot magnitude", "random mask", "50.0%", "bytes", "pruning"):
        assert text in printed
    assert Ticket.from_pretrained(tmp_path / "out" / "ticket").sparsity > 0.49
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert (model.bert.encoder.layer[0].output.dense.weight == 0).any()
    assert (tmp_path / "out" / "sparsity_per_layer.png").stat().st_size > 1000
