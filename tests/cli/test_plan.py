"""`sparse-hf plan`: from a config alone."""

import json

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from sparse_hf.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=2, architectures=["LlamaForCausalLM"], **shape)
    config.save_pretrained(path)
    return path


def invoke(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "160"})


def test_a_row_for_each_strategy_and_number_of_gpus(folder):
    result = invoke(folder, "--processes", 8, "--processes", 64)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    rows = [row for row in rows if row and row[0] in ("8", "64")]
    strategies = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    assert [row[:2] for row in rows] == [[gpus, strategy] for gpus in ("8", "64") for strategy in strategies]
    assert all(len(row) == 11 for row in rows), rows  # also on 80 columns; "MiB" is a word


def test_json_has_bytes(folder):
    [told] = json.loads(invoke(folder, "--strategy", "ddp", "--precision", "fp32", "--json").stdout)
    assert told["processes"] == 8
    assert told["masks"] == 2 * (4 * 16 * 16 + 3 * 16 * 24)
    assert told["total"] == told["weights"] + told["gradients"] + told["optimizer"] + told["masks"]


def test_mistakes_are_said_in_a_sentence(folder, tmp_path):
    result = invoke(folder, "--strategy", "zero9")
    assert result.exit_code == 1
    assert "Unknown strategy 'zero9'. Choose one of: ddp, fsdp2" in result.stderr
    assert invoke(tmp_path / "nothing").exit_code == 1
