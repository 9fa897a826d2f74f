"""Folders of cut models, read by a Python that cannot import sparse_hf."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparse_hf.anatomy.slim import cut_units
from tiny_models import HEADS, tiny_inputs, tiny_model
from tiny_slim import GROUPED, OPT_TABLE, VARIANTS, even_masks, ragged_masks, tiny_variant


# Prints what became of every folder: ragged ones need the code in the folder, even ones are stock models.
READER = """
import json, os, sys
sys.modules["sparse_hf"] = None  # from here on `import sparse_hf` fails
import torch, transformers
from transformers import AutoConfig

report = {}
for name, auto in json.load(open("jobs.json")).items():
    load = getattr(transformers, auto).from_pretrained
    inputs, output = torch.load(name + ".pt")
    even = name.startswith("even")
    trust = {} if even else {"trust_remote_code": True}
    found = report[name] = {}
    if not even:
        for options in ({}, {"trust_remote_code": False}):
            try:
                load(name, **options)
            except ValueError as error:
                found["refused"] = found.get("refused", 0) + ("trust_remote_code=True" in str(error))
    model = load(name, **trust)
    model.save_pretrained(name + "-again")
    again = load(name + "-again", **trust)
    with torch.no_grad():
        found["equal"] = [torch.equal(one.eval()(**inputs)[0], output) for one in (model, again)]
    found["classes"] = [type(one).__name__ for one in (model, again)]
    found["modules"] = [type(one).__module__.split(".")[0] for one in (model, again)]
    found["slim"] = hasattr(model.config, "slim")
    found["files"] = [sorted(os.listdir(name)), sorted(os.listdir(name + "-again"))]
try:
    import sparse_hf
except ImportError:
    report["blocked"] = True
json.dump(report, open("report.json", "w"))
"""

RAGGED = ["bert", "gpt2", "t5"]


def cut_models():
    """name -> auto class, cut model, inputs."""
    for variant in RAGGED:
        model = tiny_variant(variant)
        yield variant, HEADS[VARIANTS[variant][1]], cut_units(model, ragged_masks(model)), tiny_inputs(model)
    model = tiny_model("opt")
    yield "opt", "AutoModel", cut_units(model, ragged_masks(model, OPT_TABLE), OPT_TABLE), tiny_inputs(model)
    for family, heads, changes in (("bert", 4, {}), ("vit", 2, {}), ("llama", 2, GROUPED)):
        model = tiny_model(family, **changes)
        masks = even_masks(model, heads=heads, neurons=24)
        yield f"even-{family}", "AutoModel", cut_units(model, masks, uniform=True), tiny_inputs(model)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    jobs = {}
    for name, auto, model, inputs in cut_models():
        jobs[name] = auto
        model.save_pretrained(folder / name)
        with torch.no_grad():
            torch.save((inputs, model(**inputs)[0]), folder / f"{name}.pt")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    home = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "home/modules"), "HF_HUB_OFFLINE": "1"}
    # -I: neither the working directory nor PYTHONPATH is searched. Without a terminal nobody is asked for trust.
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER],
        cwd=folder,
        env={**os.environ, **home},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def test_sparse_hf_was_not_there(report):
    assert report["blocked"]


@pytest.mark.parametrize("name", [*RAGGED, "opt"])
def test_trusted_code_in_the_folder_reads_it_bitwise_and_saves_it_again(report, name):
    found = report[name]
    assert found["equal"] == [True, True]
    assert all(one.startswith("Slim") for one in found["classes"])
    assert found["modules"] == ["transformers_modules"] * 2
    assert found["files"][0] == found["files"][1]
    assert "modeling_slim.py" in found["files"][1]


@pytest.mark.parametrize("name", [*RAGGED, "opt"])
def test_without_trust_it_is_refused(report, name):
    assert report[name]["refused"] == 2


@pytest.mark.parametrize("name", ["even-bert", "even-vit", "even-llama"])
def test_even_models_are_stock_models(report, name):
    found = report[name]
    assert found["equal"] == [True, True]
    assert found["modules"] == ["transformers"] * 2
    assert not found["slim"]
    assert "modeling_slim.py" not in found["files"][0]
