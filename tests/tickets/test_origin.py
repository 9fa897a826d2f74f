"""What a ticket says about where it comes from."""

import json

import pytest
import torch
from torch import nn

import sparse_hf
from sparse_hf.tickets.origin import TicketOrigin, origin_of, read_origin
from tiny_models import tiny_model


def test_origin_of_a_model():
    model = tiny_model("bert", "sequence_classification")
    model.config.name_or_path, model.config._commit_hash = "me/base", "abc"
    origin = origin_of(model, method="m", metrics={"a": 1})
    assert (origin.model_type, origin.base_model, origin.base_revision) == ("bert", "me/base", "abc")
    assert (origin.method, origin.metrics, origin.config, origin.base_fingerprint) == ("m", {"a": 1}, {}, None)
    assert origin.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert origin.versions["sparse_hf"] == sparse_hf.__version__
    assert torch.__version__.startswith(origin.versions["torch"].partition("+")[0])


def test_known_facts_win():
    assert origin_of(tiny_model("bert"), base_model="other").base_model == "other"


def test_origin_through_a_wrapper():
    model = tiny_model("gpt2")
    assert origin_of(nn.DataParallel(model)) == origin_of(model)
    assert origin_of(model).model_type == "gpt2"


def test_origin_of_a_plain_module():
    origin = origin_of(nn.Linear(2, 3))
    assert (origin.model_type, origin.base_model, origin.model_parameters) == (None, None, 9)


def test_read_origin(tmp_path):
    path = tmp_path / "o.json"
    path.write_text(json.dumps({"method": "m", "metrics": {"a": 1}, "model_parameters": 5, "other": [1]}))
    assert read_origin(path) == TicketOrigin(method="m", metrics={"a": 1}, model_parameters=5)


@pytest.mark.parametrize("name", ["method", "base_model", "base_revision", "base_fingerprint", "model_type"])
def test_texts_must_be_texts(tmp_path, name):
    path = tmp_path / "o.json"
    path.write_text(json.dumps({name: ["x"]}))
    with pytest.raises(ValueError, match=f"`{name}` in `{path}` must be a str, got"):
        read_origin(path)
