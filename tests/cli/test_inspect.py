"""`sparse-hf inspect`: the facts in lines, a table, and JSON for programs."""

import json

import pytest
from typer.testing import CliRunner

from cards.folders import save_mixture, save_sparse_model, save_structured_ticket, save_zeros
from sparse_hf.cli import app


def invoke(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": "160"})


def test_a_sparse_model_layer_by_layer(tmp_path):
    result = invoke(save_sparse_model(tmp_path / "sparse"))
    assert result.exit_code == 0, result.output
    for text in (
        "kind: sparse model",
        "zeros: 50.00% (8,704 of 17,408), by its masks",
        "zeros in the whole model: 38",
    ):
        assert text in result.output
    rows = [line.replace("│", "").split() for line in result.output.splitlines() if "encoder.layer" in line]
    assert rows == [["encoder.layer", str(layer), "6", "8,192", "50.00%", "50.00%", "50.00%"] for layer in range(2)]


def test_matrix_by_matrix_and_unasked_weights(tmp_path):
    result = invoke(save_zeros(tmp_path / "zeros"), "--matrices")
    assert "counted in the weights" in result.output
    assert "bert.encoder.layer.1.intermediate.dense.weight" in result.output
    result = invoke(tmp_path / "zeros", "--no-count-zeros")
    assert "zeros: not counted; --count-zeros reads the weights" in result.output
    assert "kind: dense model" in result.output


def test_units_and_experts(tmp_path):
    result = invoke(save_structured_ticket(tmp_path / "ticket"))
    assert "48 of 64" in result.output
    assert "experts: 4 in 2 layers, 2 per token" in invoke(save_mixture(tmp_path / "moe")).output


def test_json_for_programs(tmp_path):
    told = json.loads(invoke(save_sparse_model(tmp_path / "sparse"), "--json").stdout)
    assert (told["kind"], told["sparsity"], told["counted"]) == ("sparse_model", 0.5, "masks")
    assert len(told["matrices"]) == 13
    assert told["files"]["sparse_masks.safetensors"] < told["bytes"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "neither a folder here nor a Hub repository"),
        (lambda folder: folder.mkdir(), "must hold a model in safetensors, a ticket or an adapter"),
        (
            lambda folder: (save_sparse_model(folder) / "sparse_masks.safetensors").write_bytes(b"x"),
            "usable mask file",
        ),
        (lambda folder: (save_zeros(folder) / "model.safetensors").write_bytes(b"x" * 9), "usable checkpoint file"),
        (lambda folder: (save_zeros(folder) / "config.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, prepare, message):
    prepare(tmp_path / "it")
    result = invoke(tmp_path / "it")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_names_that_would_steer_a_terminal_do_not(tmp_path):
    folder = save_sparse_model(tmp_path / "sparse")
    path = folder / "sparse_hf.json"
    said = {**json.loads(path.read_text()), "method": "\x1b]0;owned\x07[red]x[/red]", "base_model": "a\nkind: b"}
    path.write_text(json.dumps(said))
    output = invoke(folder).output
    assert "\x1b" not in output
    assert "[red]x[/red]" in output
    assert "\nkind: b" not in output
