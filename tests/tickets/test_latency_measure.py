"""Measuring leaves the model alone and gives a whole table; what is faster is not asserted, machines are noisy."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from sparse_hf.tickets.latency_measure import measure_latency, non_decreasing
from tiny_models import tiny_inputs, tiny_model


MODELS = [
    ("bert", "sequence_classification", 8),
    ("distilbert", "base", 8),
    ("gpt2", "causal_lm", 8),
    ("llama", "causal_lm", 8),
    ("vit", "image_classification", 5),  # four patches and the class token
    ("t5", "T5EncoderModel", 8),
    ("t5", "seq2seq_lm", 8),
]


def measure(model, what="training", seconds=0.2, **options):
    return measure_latency(model, what, batch=2, length=8, seconds=seconds, **options)


@pytest.mark.parametrize("what", ["training", "inference"])
@pytest.mark.parametrize(("family", "head", "length"), MODELS)
def test_a_table_of_each_family(family, head, length, what):
    model = tiny_model(family, head)
    latency = measure(model, what)
    units = find_units(model)
    assert (len(latency.heads), latency.neuron_counts) == (units[0].count, tuple(range(16, units[1].count + 1, 16)))
    assert (latency.layers, latency.what, latency.batch, latency.length) == (2, what, 2, length)
    assert min(latency.heads) > 0
    assert min(latency.neurons) > 0
    assert latency.device == "cpu"
    whole = {one.key: one.count for one in units}
    assert latency.predicted(whole) == pytest.approx(latency.dense)
    assert latency.predicted(dict.fromkeys(whole, 1)) <= latency.dense


@pytest.mark.parametrize("what", ["training", "inference"])
def test_model_and_random_state_are_as_before(what):
    model = tiny_model("gpt2", "causal_lm")
    model.train()
    model.transformer.h[1].eval()  # a mode that differs inside
    model(**tiny_inputs(model)).logits.sum().backward()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    config, state = model.config.to_dict(), torch.random.get_rng_state()
    measure(model, what)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert model.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradient_hooks_of_the_user_do_not_run():
    model, calls = tiny_model("bert"), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(calls.append)
    measure(model, seconds=0)
    assert not calls
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_when_the_model_fails():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="input_ids"):
        measure(model, inputs={})
    assert not model.training
    assert model.config.use_cache


def test_given_inputs_and_labels_are_used():
    model = tiny_model("bert", "sequence_classification")
    inputs = {**tiny_inputs(model, batch=3, length=6), "labels": torch.tensor([0, 1, 2])}
    latency = measure(model, seconds=0, inputs=inputs)
    assert (latency.batch, latency.length) == (3, 6)


def test_neuron_counts_are_multiples_and_the_whole_width():
    latency = measure(tiny_model("bert", intermediate_size=72), seconds=0, multiple_of=32)
    assert latency.neuron_counts == (32, 64, 72)
    assert measure(tiny_model("bert"), seconds=0, multiple_of=100).neuron_counts == (64,)
    many = measure(tiny_model("bert", intermediate_size=640), seconds=0).neuron_counts
    assert len(many) == 13
    assert (many[0], many[-1]) == (16, 640)
    assert all(count % 16 == 0 for count in many)


def test_more_heads_than_points_are_filled_in():
    model = tiny_model("bert", hidden_size=40, num_attention_heads=20)
    assert len(measure(model, seconds=0).heads) == 20


def test_frozen_and_checkpointing_models_can_be_measured():
    model = tiny_model("llama", "causal_lm")
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = (
            True,
            partial(checkpoint, use_reentrant=False),
        )
    assert measure(model, seconds=0).layers == 2
    model.requires_grad_(False)
    assert measure(model, "inference", seconds=0).layers == 2
    with pytest.raises(ValueError, match="needs parameters that require gradients"):
        measure(model, seconds=0)


def test_autocast_may_be_around_it():
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(tiny_model("bert"), seconds=0).layers == 2


def test_layers_that_differ_have_no_table():
    model = tiny_model("bert")
    kept = {one.key: torch.arange(one.count) < 2 + (one.key == "encoder.layer.1.heads") for one in find_units(model)}
    with pytest.raises(ValueError, match=r"same number of heads for one latency table, got \[2, 3\]"):
        measure(cut_units(model, kept), seconds=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"what": "both"}, "`what` must be one of 'training', 'inference', got 'both'"),
        ({"batch": 0}, "`batch` must be at least 1, got 0"),
        ({"multiple_of": 0}, "`multiple_of` must be at least 1, got 0"),
        ({"length": 41}, "`length` must be at most the 40 positions of the model, got 41"),
        ({"seconds": math.nan}, "`seconds` must be a limit of 0 or more, got nan"),
        ({"seconds": math.inf}, "`seconds` must be a limit of 0 or more, got inf"),
    ],
)
def test_bad_requests(options, told):
    with pytest.raises(ValueError, match=told):
        measure_latency(tiny_model("bert"), **options)


def test_pooled_neighbours_by_hand():
    assert non_decreasing([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert non_decreasing([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert non_decreasing([2.0, 4.0, 1.0, 5.0, 5.0]) == pytest.approx([2.0, 2.5, 2.5, 5.0, 5.0])
    assert non_decreasing([]) == []


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_pooled_numbers_are_the_closest_that_never_fall(values):
    pooled = non_decreasing(values)
    assert all(low <= high for low, high in itertools.pairwise(pooled))

    def distance(numbers):
        return sum((number - value) ** 2 for number, value in zip(numbers, values, strict=True))

    rising = itertools.combinations_with_replacement([step / 2 for step in range(9)], len(values))
    assert distance(pooled) <= min(map(distance, rising)) + 1e-9
