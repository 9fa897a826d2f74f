"""`sparse-hf` as a user types it."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from sparse_hf import Ticket
from sparse_hf.cli import app
from tiny_folder import save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_prune_writes_a_stock_folder_with_its_head_and_masks(model_folder, tmp_path):
    result = invoke("prune", model_folder, tmp_path / "sparse", "--sparsity", "0.75")
    assert result.exit_code == 0, result.output
    assert "75.00% of the prunable weights" in result.output
    before = AutoModelForSequenceClassification.from_pretrained(model_folder)
    after, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(before.classifier.weight, after.classifier.weight)
    ticket = Ticket.from_pretrained(tmp_path / "sparse")
    for name, mask in ticket.masks().items():
        weight = after.get_parameter(f"bert.{name}")
        assert torch.equal(weight == 0, ~mask)


def test_show_names_every_matrix_and_both_denominators(model_folder, tmp_path):
    invoke("prune", model_folder, tmp_path / "sparse", "--sparsity", "0.5", "--budget", "uniform")
    picture = tmp_path / "layers.png"
    result = invoke("ticket", "show", tmp_path / "sparse", "--picture", picture)
    assert result.exit_code == 0, result.output
    for text in ("encoder.layer.1.output.dense.weight", "all prunable weights", "whole model", "one_shot", "50.00%"):
        assert text in result.output
    assert picture.stat().st_size > 1000


def test_compare_and_apply(model_folder, tmp_path):
    invoke("prune", model_folder, tmp_path / "a", "--sparsity", "0.5")
    invoke("prune", model_folder, tmp_path / "b", "--sparsity", "0.5", "--score", "random")
    same, other = (
        invoke("ticket", "compare", tmp_path / "a", tmp_path / "a"),
        invoke("ticket", "compare", tmp_path / "a", tmp_path / "b"),
    )
    assert "overlap (kept by both / kept by either): 1.0000" in same.output
    assert "distance (fraction of differing positions): 0.0000" in same.output
    assert "1.0000" not in other.output
    result = invoke("ticket", "apply", tmp_path / "a", model_folder, tmp_path / "applied")
    assert result.exit_code == 0, result.output
    one, two = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("a", "applied"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("prune", "MODEL", "NEW", "--sparsity", "1.0"), "must be in [0, 1)", id="sparsity"),
        pytest.param(("prune", "MODEL", "MODEL"), "must be new or empty", id="output-not-empty"),
        pytest.param(("prune", "MODEL", "NEW", "--include", "encoder.layer.7*"), "encoder.layer.1", id="pattern"),
        pytest.param(("prune", "MODEL", "NEW", "--score", "gradient"), "magnitude or random", id="score"),
        pytest.param(("ticket", "show", "NEW"), "neither a folder here nor a Hub repository", id="no-ticket"),
        pytest.param(("ticket", "show", "MODEL"), "sparse_masks.safetensors", id="model-without-masks"),
    ],
)
def test_a_mistake_gets_one_sentence_and_changes_nothing(model_folder, tmp_path, words, message):
    places = {"MODEL": str(model_folder), "NEW": str(tmp_path / "new")}
    result = invoke(*(places.get(word, word) for word in words))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
