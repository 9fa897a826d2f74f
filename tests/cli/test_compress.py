"""`sparse-hf compress`, `decompress` and `publish` as a user types them."""

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hub.hub_server import hub as hub  # a fixture
from sparse_hf.cards import card
from sparse_hf.cli import app
from tiny_sparse import sparse_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    sparse_model().save_pretrained(folder)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def same(one, other):
    one, other = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (one, other))
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_there_and_back(dense, tmp_path):
    result = invoke("compress", dense, tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert " bytes of weights instead of " in result.output
    result = invoke("decompress", tmp_path / "small", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert same(dense, tmp_path / "back")


def test_with_coded_values(dense, tmp_path):
    pytest.importorskip("zstandard")
    for name, more in (("small", []), ("smaller", ["--zstd"])):
        assert invoke("compress", dense, tmp_path / name, *more).exit_code == 0
    small, smaller = ((tmp_path / name / "compressed.safetensors").stat().st_size for name in ("small", "smaller"))
    assert smaller < 0.95 * small
    assert "bitmask+zstd" in invoke("inspect", tmp_path / "smaller", "--json").output
    assert same(dense, tmp_path / "smaller")


def test_publish(hub, dense, monkeypatch):
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)
    result = invoke("publish", dense, "me/model", "--compressed", "--private", "--message", "mine")
    assert result.exit_code == 0, result.output
    repository = hub.repositories.named["me/model"]
    assert f"https://huggingface.co/me/model/commit/{repository.refs['main']}" in result.output
    assert repository.private
    assert repository.messages[-1] == "mine"
    assert "compressed.safetensors" in hub.files("me/model")
    assert same(dense, "me/model")
    assert invoke("publish", dense, "me/model").exit_code == 0
    assert "model.safetensors" in hub.files("me/model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("compress", "DENSE", "DENSE"), "must be another one than the source", id="onto-itself"),
        pytest.param(("compress", "NOWHERE", "NEW"), "is no folder", id="no-source"),
        pytest.param(("decompress", "DENSE", "NEW"), "must hold `compressed.safetensors`", id="not-compressed"),
        pytest.param(("publish", "NOWHERE", "me/model", "--compressed"), "must hold a model", id="nothing-to-publish"),
    ],
)
def test_a_mistake_gets_one_sentence_and_changes_nothing(dense, tmp_path, words, message):
    places = {"DENSE": str(dense), "NOWHERE": str(tmp_path / "nowhere"), "NEW": str(tmp_path / "new")}
    result = invoke(*(places.get(word, word) for word in words))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
