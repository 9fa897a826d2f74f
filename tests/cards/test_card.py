"""What a card says of each kind of folder, and its code in it."""

import dataclasses

import pytest

from cards.folders import save_mixture, save_slim_model, save_sparse_model, save_structured_ticket
from pretended_packages import pretend
from sparse_hf import inspect, write_card
from sparse_hf.cards.card import draw_layers, known_metrics, make_card
from sparse_hf.cards.inspection import Inspection
from sparse_hf.cards.making import CONFIGS, making_code
from sparse_hf.tickets.config_json import METHODS, config_to_dict


def test_a_card_line_by_line(tmp_path):
    text = str(make_card(inspect(save_sparse_model(tmp_path / "it")), "me/it", {"eval_accuracy": 0.91}, "mit"))
    for line in (
        *("license: mit", "pipeline_tag: text-classification", "  - task:", "    - type: accuracy", "# it"),
        "| zeros among the prunable weights | 50.00% (8,704 of 17,408) |",
        "| zeros in the whole model | 38.30% |",
        "sparse-hf prune MODEL FOLDER --sparsity 0.5 --score magnitude --budget uniform --seed 0",
        'model = AutoModelForSequenceClassification.from_pretrained("me/it")',
        "| `encoder.layer 1` | 8,192 | 50.00% | 50.0% – 50.0% |",
        "| accuracy | 0.91 |",
    ):
        assert f"\n{line}\n" in text
    assert "base_model" not in text  # a tiny model has none


@pytest.mark.parametrize("method", METHODS)
def test_the_code_on_a_card_makes_the_config_again(method):
    given = {"heads": 0.5} if method == "early_bird" else {"sparsity": 0.7, "include": ("encoder.*",)}
    config = METHODS[method](**given)
    language, text = making_code(Inspection("x", "ticket", method=method, config=config_to_dict(config)))
    assert language == "python"
    assert CONFIGS[method] == type(config).__name__
    made = text.partition("config = ")[2].partition("\nSparseTrainer(")[0]
    again = eval(made, {CONFIGS[method]: METHODS[method]})
    plain = {name: list(one) if isinstance(one, tuple) else one for name, one in vars(config).items()}
    assert {name: list(one) if isinstance(one, tuple) else one for name, one in vars(again).items()} == plain


def test_pictures(tmp_path, monkeypatch):
    units = inspect(save_structured_ticket(tmp_path / "units"))
    assert draw_layers(units, tmp_path / "a.png") == "a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert draw_layers(inspect(save_mixture(tmp_path / "dense")), tmp_path / "b.png") is None  # nothing is gone
    pretend(monkeypatch, "matplotlib", installed=False)
    assert draw_layers(units, tmp_path / "c.png") is None
    write_card(tmp_path / "units")
    assert "![" not in (tmp_path / "units" / "README.md").read_text()


def test_code_that_comes_along_is_told_of(tmp_path):
    text = str(make_card(inspect(save_slim_model(tmp_path / "slim")), "me/slim", {}))
    assert "trust_remote_code=True" in text
    assert "import sparse_hf\n" in text
    assert "| heads kept | 4 |" in text


def test_the_load_of_experts_is_shown_where_it_was_drawn(tmp_path):
    folder = save_mixture(tmp_path / "moe")
    (folder / "expert_load.png").write_bytes(b"x")
    text = str(make_card(inspect(folder), "me/moe", {}))
    assert "(expert_load.png)" in text
    assert "| experts per layer | 4 |" in text
    assert "zeros" not in text  # a row of padding is not worth a word


def test_a_folder_that_looks_like_an_id_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    found = dataclasses.replace(inspect(save_sparse_model(tmp_path / "it")), base_model="models/bert")
    assert make_card(found, "me/it", {}).data.base_model is None
    assert "| base model | `bert` |" in str(make_card(found, "me/it", {}))
    other = dataclasses.replace(found, base_model="google/bert")
    assert make_card(other, "me/it", {}).data.base_model == "google/bert"


def test_metrics_tell_of_the_model():
    measured = {"eval_loss": 0.5, "eval_runtime": 3.0, "epoch": 1.0, "f1": 0.8, "": 1.0}
    assert known_metrics(measured) == {"loss": 0.5, "f1": 0.8}
    assert len(known_metrics({f"m{number}": 1.0 for number in range(99)})) == 50
