"""Pruning once, in place: exact, or an error and an unchanged model."""

import math

import pytest
import torch
from torch import nn

from sparse_hf import prune
from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.anatomy import find_sites, named_canonical_parameters
from sparse_hf.tickets.ticket import Ticket
from tiny_models import tiny_inputs, tiny_model


def backward(model):
    model(**tiny_inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    return model


@pytest.mark.parametrize(("family", "head"), [("bert", "base"), ("gpt2", "causal_lm"), ("mixtral", "causal_lm")])
@pytest.mark.parametrize("budget", ["global", "uniform", "erdos_renyi", "erdos_renyi_kernel"])
def test_count_is_exact_and_the_model_holds_the_mask(family, head, budget):
    model = tiny_model(family, head)
    before = {name: p.detach().clone() for name, p in named_canonical_parameters(model).items()}
    ticket = prune(model, 0.6, budget=budget)
    assert ticket.num_kept == num_kept(ticket.num_weights, 0.6)
    for name, tensor in named_canonical_parameters(model).items():
        assert torch.equal(tensor, before[name] * ticket.mask(name) if name in ticket.bits else before[name])


def test_origin_says_how():
    ticket = prune(tiny_model("bert"), 0.25, score="random", budget="uniform", seed=4)
    assert ticket.origin.method == "one_shot"
    assert ticket.origin.config == {"sparsity": 0.25, "score": "random", "budget": "uniform", "seed": 4}
    assert ticket.origin.model_type == "bert"


def test_plain_module_by_hand():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0, 2.0], [-4.0, 0.5, -6.0]]))
    bias = model[0].bias.detach().clone()
    ticket = prune(model, 0.5)
    assert model[0].weight.tolist() == [[3, 0, 0], [-4, 0, -6]]
    assert torch.equal(model[0].bias, bias)
    assert ticket.mask("0.weight").tolist() == [[True, False, False], [True, False, True]]


def test_include_and_exclude():
    model = tiny_model("bert")
    ticket = prune(model, 0.5, include="encoder.*", exclude="*.query.weight")
    expected = {site.name for site in find_sites(model, "encoder.*", "*.query.weight")}
    assert set(ticket.bits) == expected
    assert not any("query" in name or "pooler" in name for name in ticket.bits)


def test_pruned_again_is_nested():
    model = tiny_model("bert")
    first, second = prune(model, 0.3), prune(model, 0.6)
    assert not any((second.mask(name) & ~first.mask(name)).any() for name in first.bits)


def test_seed_decides_the_random_mask():
    tickets = [prune(tiny_model("bert"), 0.5, score="random", seed=seed) for seed in (0, 0, 1)]
    assert tickets[0].distance(tickets[1]) == 0
    assert tickets[0].distance(tickets[2]) > 0.3


def test_gradient_score_reads_grad_or_the_given_gradients():
    model = backward(tiny_model("bert", "sequence_classification"))
    gradients = {name: p.grad for name, p in named_canonical_parameters(model).items() if p.grad is not None}
    own = prune(model, 0.5, score="gradient")
    given = prune(tiny_model("bert", "sequence_classification"), 0.5, score="gradient", gradients=gradients)
    assert own.distance(given) == 0
    assert own.distance(prune(tiny_model("bert", "sequence_classification"), 0.5)) > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparsity": 1.0}, "must be in"),
        ({"sparsity": -0.1}, "must be in"),
        ({"sparsity": math.nan}, "must be in"),
        ({"sparsity": 0.9999}, "lower the sparsity or pass"),
        ({"score": "movement"}, "Unknown score 'movement'. Choose one of: magnitude, gradient, random."),
        ({"budget": "erk"}, "Unknown budget 'erk'. Choose one of: global, uniform, erdos_renyi, erdos_renyi_kernel."),
        ({"score": "gradient"}, "`encoder.layer.0.attention.self.query.weight` has none. Run a backward pass first."),
        ({"include": "absent.*"}, "matches none"),
    ],
)
def test_errors_leave_the_model_unchanged(options, reason):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=reason):
        prune(model, **{"sparsity": 0.5, **options})
    assert Ticket.from_model(model).sparsity == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_diverged_weights_leave_the_model_unchanged(value, budget):
    model = tiny_model("bert")
    name = "encoder.layer.1.attention.output.dense.weight"
    with torch.no_grad():
        named_canonical_parameters(model)[name][0, 0] = value
    with pytest.raises(ValueError, match=f"NaN or infinity in `{name}`"):
        prune(model, 0.5, budget=budget)
    assert Ticket.from_model(model).sparsity == 0
