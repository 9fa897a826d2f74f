"""The recipe's methods, three steps each, by the command a user types."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from sparse_hf import dsee_sparsity


RECIPE = "dsee_glue.py"
STEPS = 3
SMALL = ("--r", "2", "--nnz", "8", "--target_modules", "query", "value")
HEAD = 2 * 16 + 2  # the classifier, which every method trains


def results(places, name, seed=0):
    return json.loads((places["root"] / name / f"seed-{seed}" / "eval_results.json").read_text())


def test_two_stages_over_two_seeds(run, places, capsys):
    run("two", *SMALL, "--masked_modules", "key", "--sparsity", "0.5", "--first_epochs", "1", "--seeds", "3", "4")
    printed = capsys.readouterr().out
    assert "over seeds [3, 4]" in printed
    assert f"trained_parameters: {4 * (2 * 32 + 8) + HEAD}" in printed
    for seed in (3, 4):
        found = results(places, "two", seed)
        assert found["base_sparsity"] == 0.5
        assert found["merged_sparsity"] == pytest.approx(0.5 / 3, abs=0.02)  # only key stays sparse
        folder = places["root"] / "two" / f"seed-{seed}"
        assert json.loads((folder / "search.json").read_text())["finished"]
        base = AutoModelForSequenceClassification.from_pretrained(places["model"])
        assert dsee_sparsity(PeftModel.from_pretrained(base, folder)).base == 0.5
    assert results(places, "two", 3)["eval_loss"] != results(places, "two", 4)["eval_loss"]


def test_masked_from_the_start(run, places):
    run("start", *SMALL, "--base_sparsity", "0.25")
    assert results(places, "start")["base_sparsity"] == 0.25
    assert not (places["root"] / "start" / "seed-0" / "search.json").exists()


def test_what_it_is_compared_with(run, places):
    small = ("--r", "2", "--target_modules", "query", "value")
    trained = {}
    for method in ("lora", "shira", "full"):
        run(method, *small, "--method", method)
        trained[method] = results(places, method)["trained_parameters"]
    assert trained["lora"] == trained["shira"] == 4 * 2 * 32 + HEAD
    assert trained["full"] > 1000


def test_a_finished_seed_is_not_repeated(run, places):
    run("again", *SMALL)
    kept = places["root"] / "again" / "seed-0" / "eval_results.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "eval_loss": 42.0}))
    run("again", *SMALL, "--seeds", "0", "1")
    assert results(places, "again")["eval_loss"] == 42.0
    assert results(places, "again", 1)["eval_loss"] != 42.0


def test_another_experiment_in_the_same_folder(run):
    run("mixed", *SMALL)
    with pytest.raises(ValueError, match="holds a run with nnz=8, got 4"):
        run("mixed", "--r", "2", "--nnz", "4", "--target_modules", "query", "value")


def test_a_support_by_gradient(run, places):
    places_of = {}
    for support in ("magnitude", "gradient"):
        run(support, *SMALL, "--support", support)
        tensors = load_file(places["root"] / support / "seed-0" / "adapter_model.safetensors")
        places_of[support] = {name: one for name, one in tensors.items() if "indices" in name}
    assert len(places_of["gradient"]) == 4
    for name, indices in places_of["gradient"].items():
        assert indices.shape == (8,)
        assert not torch.equal(indices, places_of["magnitude"][name])
