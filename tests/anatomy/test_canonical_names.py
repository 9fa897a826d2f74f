"""Canonical names under heads, ties and wrappers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparse_hf.anatomy import (
    canonical_name,
    canonical_names,
    find_sites,
    full_name,
    head_names,
    named_canonical_parameters,
)
from tiny_models import CONFIGS, tiny_model


QUERY = "encoder.layer.0.attention.self.query.weight"


class Headed(nn.Module):
    """A model in the manner of Transformers whose head comes first and is tied to its body."""

    base_model_prefix = "body"

    def __init__(self, head_name: str = "head"):
        super().__init__()
        self.add_module(head_name, nn.Linear(2, 3))
        self.body = nn.Sequential(nn.Embedding(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.get_submodule(head_name).weight = self.body[0].weight


def untied_t5():
    """A T5 with output embeddings of its own, which its config cannot ask for in Transformers 5."""
    model = tiny_model("t5", "seq2seq_lm")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_base_parameters_lose_the_prefix_and_heads_keep_their_name():
    model = tiny_model("bert", "sequence_classification")
    assert canonical_name(model, f"bert.{QUERY}") == QUERY
    assert full_name(model, QUERY) == f"bert.{QUERY}"
    assert canonical_name(model, "classifier.weight") == full_name(model, "classifier.weight") == "classifier.weight"


def test_bare_and_headed_model_have_the_same_base_parameters_in_the_same_order():
    bare = named_canonical_parameters(tiny_model("bert"))
    headed = named_canonical_parameters(tiny_model("bert", "sequence_classification"))
    assert list(headed) == [*bare, "classifier.weight", "classifier.bias"]
    assert list(bare) == [name for name, _ in tiny_model("bert").named_parameters()]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_once_and_names_there_and_back(family):
    head = {"vit": "image_classification", "t5": "question_answering"}.get(family, "sequence_classification")
    model = tiny_model(family, head)
    parameters = named_canonical_parameters(model)
    assert {id(parameter) for parameter in parameters.values()} == {id(parameter) for parameter in model.parameters()}
    assert len(parameters) == len(list(model.parameters()))
    canonical = canonical_names(model)
    for full, parameter in model.named_parameters(remove_duplicate=False):
        assert parameters[canonical[full]] is parameter
    for name in (next(iter(parameters)), next(reversed(parameters))):
        assert model.get_parameter(full_name(model, name)) is parameters[name]
        assert canonical_name(model, full_name(model, name)) == name


def test_tied_parameter_goes_by_its_name_in_the_base_model():
    model = tiny_model("bert", "masked_lm")
    assert canonical_name(model, "cls.predictions.decoder.weight") == "embeddings.word_embeddings.weight"
    assert full_name(model, "embeddings.word_embeddings.weight") == "bert.embeddings.word_embeddings.weight"
    assert "cls.predictions.transform.dense.weight" in head_names(model).parameters
    assert "embeddings.word_embeddings.weight" not in head_names(model).parameters


def test_tied_head_that_comes_first_does_not_move_the_base_parameter():
    assert list(named_canonical_parameters(Headed())) == [
        "head.bias",
        "0.weight",
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    ]
    assert canonical_names(Headed())["head.weight"] == "0.weight"
    assert head_names(Headed()).parameters == {"head.bias"}


def test_buffers_have_names_too():
    model = Headed()
    model.register_buffer("scale", torch.ones(1))
    assert canonical_name(model, "body.1.running_mean") == "1.running_mean"
    assert head_names(model).buffers == {"scale"}


def test_head_named_like_a_part_of_the_base_model_is_an_error():
    with pytest.raises(ValueError, match="`2.bias` and `body.2.bias` would both be `2.bias`: rename"):
        named_canonical_parameters(Headed(head_name="2"))


@pytest.mark.parametrize("lookup", [canonical_name, full_name])
def test_unknown_names_are_answered_with_near_ones(lookup):
    with pytest.raises(
        ValueError, match="`Headed` has no parameter or buffer `head.bais`: near names are `head.bias`"
    ):
        lookup(Headed(), "head.bais")


@pytest.mark.parametrize(
    ("family", "head", "expected"),
    [
        ("bert", "base", set()),
        ("t5", "base", set()),
        ("bert", "sequence_classification", {"classifier.weight", "classifier.bias"}),
        ("llama", "causal_lm", {"lm_head.weight"}),
        ("gpt2", "causal_lm", set()),  # tied
        ("t5", "seq2seq_lm", set()),  # tied
        ("t5", "question_answering", {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_head_names(family, head, expected):
    assert head_names(tiny_model(family, head)).parameters == expected


def test_untied_output_embeddings_are_the_head_of_a_model_without_base_module():
    model = untied_t5()
    assert head_names(model).parameters == {"lm_head.weight"}
    assert find_sites(model) == find_sites(tiny_model("t5"))
    assert canonical_name(model, "encoder.final_layer_norm.weight") == "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(("head", "base"), [("sequence_classification", "bert."), ("base", "")])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (torch.compile, "_orig_mod."),
        (nn.DataParallel, "module."),
        (lambda model: torch.compile(nn.DataParallel(model)), "_orig_mod.module."),
    ],
)
def test_wrappers_leave_no_trace_in_canonical_names(wrap, prefix, head, base):
    model = tiny_model("bert", head)
    plain = named_canonical_parameters(model)
    wrapped = wrap(model)
    found = named_canonical_parameters(wrapped)
    assert list(found) == list(plain)
    assert all(found[name] is plain[name] for name in plain)
    assert full_name(wrapped, QUERY) == f"{prefix}{base}{QUERY}"
    assert canonical_name(wrapped, f"{prefix}{base}{QUERY}") == QUERY
    assert head_names(wrapped) == head_names(model)
    assert find_sites(wrapped) == find_sites(model)


def test_distributed_data_parallel_is_unwrapped(one_process_group):
    model = untied_t5()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert list(named_canonical_parameters(wrapped)) == list(named_canonical_parameters(model))
    assert full_name(wrapped, "shared.weight") == "module.shared.weight"
    assert head_names(wrapped).parameters == {"lm_head.weight"}


def test_wrappers_inside_the_model_are_unwrapped():
    model = tiny_model("bert", "sequence_classification")
    plain = list(named_canonical_parameters(model))
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])
    model.bert = torch.compile(model.bert)
    assert list(named_canonical_parameters(model)) == plain
    assert full_name(model, QUERY) == "bert._orig_mod.encoder.layer.0._orig_mod.attention.self.query.weight"


def test_an_attribute_that_only_happens_to_be_called_module_stays():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert list(named_canonical_parameters(model)) == ["module.weight", "module.bias"]
