"""Folders of generic mixtures of experts, read by a Python that cannot import sparse_hf."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparse_hf import RouterConfig
from tiny_mixtures import VARIANTS, convert, tiny_dense
from tiny_models import tiny_inputs


READER = """
import json, os, sys
sys.modules["sparse_hf"] = None  # from here on `import sparse_hf` fails
import torch, transformers

report = {}
for name, (auto, stock) in json.load(open("jobs.json")).items():
    load = getattr(transformers, auto).from_pretrained
    inputs, output = torch.load(name + ".pt")
    found = report[name] = {"refused": [], "stock": "loaded"}
    for options in ({}, {"trust_remote_code": False}):
        try:
            load(name, **options)
        except ValueError as error:
            found["refused"].append("trust_remote_code=True" in str(error))
    try:
        getattr(transformers, stock).from_pretrained(name)
    except RuntimeError as error:
        found["stock"] = str(error)
    model = load(name, trust_remote_code=True)
    model.save_pretrained(name + "-again")
    again = load(name + "-again", trust_remote_code=True)
    with torch.no_grad():
        found["differences"] = [float((one(**inputs)[0] - output).abs().max()) for one in (model, again)]
    found["classes"] = [type(one).__name__ for one in (model, again)]
    found["modules"] = [type(one).__module__.split(".")[0] for one in (model, again)]
    found["implementation"] = model.get_experts_implementation()[""] if hasattr(
        model, "get_experts_implementation") else model.config._experts_implementation
    found["files"] = sorted(os.listdir(name + "-again"))
try:
    import sparse_hf
except ImportError:
    report["blocked"] = True
json.dump(report, open("report.json", "w"))
"""

NAMES = ["gpt2", "bert", "roberta", "vit", "vit-base", "t5", "t5-gated"]
# Another router -> variant, router, experts per token; all of them keep the dense function.
ROUTED = {
    "gpt2-hash": ("gpt2", RouterConfig("hash"), 1),
    "bert-experts": ("bert", RouterConfig("expert_choice", capacity_factor=4), 2),
    "vit-cosine": ("vit", RouterConfig("cosine", bias=True), 2),
}
FOLDERS = {**{name: (name, None, 2) for name in NAMES}, **ROUTED}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    jobs = {}
    for name, (variant, router, top_k) in FOLDERS.items():
        dense = tiny_dense(variant)
        dense.save_pretrained(folder / "dense" / name)
        convert(folder / "dense" / name, folder / name, router=router, top_k=top_k)
        jobs[name] = (VARIANTS[variant][3], type(dense).__name__)
        inputs = tiny_inputs(dense)
        with torch.no_grad():
            torch.save((inputs, dense(**inputs)[0]), folder / f"{name}.pt")
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


@pytest.mark.parametrize("name", FOLDERS)
def test_trusted_code_in_the_folder_computes_the_same_and_saves_it_again(report, name):
    found = report[name]
    assert max(found["differences"]) < 1e-4
    assert all(one.startswith("Mixture") for one in found["classes"])
    assert found["modules"] == ["transformers_modules"] * 2
    assert found["implementation"] == "grouped_mm"
    code = {"modeling_mixture.py", "mixture_block.py", "mixture_routers.py"}
    assert {"config.json", "model.safetensors", *code} <= set(found["files"])


@pytest.mark.parametrize("name", FOLDERS)
def test_without_trust_it_is_refused(report, name):
    assert report[name]["refused"] == [True, True]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_stock_class_refuses_it_instead_of_making_fresh_ffns(report, name):
    assert "ignore_mismatched_sizes" in report[name]["stock"]
