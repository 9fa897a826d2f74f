"""Coefficients of one change nothing, coefficients of zero cut, and what they learn is right."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from sparse_hf.tickets import coefficients as module_under_test
from sparse_hf.tickets.coefficients import ATTRIBUTE, UnitCoefficients, fold_coefficients
from tiny_models import tiny_inputs, tiny_model
from tiny_slim import OPT_TABLE, VARIANTS, ragged_masks, tiny_variant


def set_values(coefficients, values):
    for one, parameter in zip(coefficients.units, coefficients.values, strict=True):
        parameter.data.copy_(values[one.key])


def random_values(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {one.key: 2 * torch.rand(one.count, generator=generator) - 0.5 for one in find_units(model)}


def attached(variant, **changes):
    """A model with random coefficients, and these."""
    model = tiny_variant(variant, **changes)
    coefficients = UnitCoefficients.attach(model)
    set_values(coefficients, random_values(model))
    return model, coefficients


def gradients(model, coefficients, run=None):
    """Of every coefficient and of one weight before and after them."""
    model.zero_grad()
    (model if run is None else run)(**tiny_inputs(model))[0].float().square().sum().backward()
    first = coefficients.units[0].output
    named = {one.key: value.grad for one, value in zip(coefficients.units, coefficients.values, strict=True)}
    return named | {"embedding": next(model.parameters()).grad, "read": model.get_submodule(first).weight.grad}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for key in wanted:
        assert wanted[key].abs().max() > 0, key
        torch.testing.assert_close(found[key], wanted[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_ones_change_nothing_and_detach_leaves_nothing(variant, dtype):
    model = tiny_variant(variant).to(dtype)
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tiny_inputs(model).items()}
    before, names = model(**inputs)[0], list(model.state_dict())
    coefficients = UnitCoefficients.attach(model)
    assert {value.dtype for value in coefficients.values} == {torch.float32}
    assert all(torch.equal(score, torch.ones_like(score)) for score in coefficients.scores().values())
    assert torch.equal(model(**inputs)[0], before)
    added = [f"{ATTRIBUTE}.values.{number}" for number in range(len(coefficients.units))]
    assert set(model.state_dict()) == {*names, *added}
    set_values(coefficients, random_values(model))
    assert not torch.equal(model(**inputs)[0], before)
    coefficients.detach(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_zeros_equal_the_cut_model(variant):
    model = tiny_variant(variant)
    masks, inputs = ragged_masks(model), tiny_inputs(model)
    smaller = cut_units(model, masks)
    set_values(UnitCoefficients.attach(model), masks)
    assert (model(**inputs)[0] - smaller(**inputs)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_folded_equals_attached(variant):
    model, coefficients = attached(variant)
    inputs = tiny_inputs(model)
    wanted = model(**inputs)[0]
    coefficients.detach(model)
    assert (model(**inputs)[0] - wanted).abs().max() > 1e-3
    fold_coefficients(model, random_values(model))
    torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("variant", "kind", "shape"), [("bert", nn.Linear, (1, 32)), ("gpt2", Conv1D, (32, 1))])
@torch.no_grad()
def test_fold_scales_what_reads_the_unit(variant, kind, shape):
    model = tiny_variant(variant)
    heads = find_units(model)[0]
    output, values = model.get_submodule(heads.output), {one.key: torch.ones(one.count) for one in find_units(model)}
    values[heads.key][1] = 3.0
    before, factor = output.weight.clone(), torch.tensor([1.0, 3.0, 1.0, 1.0]).repeat_interleave(8)
    fold_coefficients(model, values)
    assert isinstance(output, kind)
    assert torch.equal(output.weight, before * factor.reshape(shape))


@torch.no_grad()
def test_fold_computes_in_the_higher_precision():
    values = {one.key: torch.full((one.count,), 1.003) for one in find_units(tiny_variant("bert"))}
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_variant("bert").to(dtype)
        weight = model.get_submodule(find_units(model)[0].output).weight
        weight += 1e-12
        wanted = (weight.double() * torch.tensor(1.003).double()).to(dtype)
        fold_coefficients(model, values)
        assert weight.dtype == dtype
        assert (weight == wanted).double().mean() > 0.99  # fp32 between may round a tie the other way


def test_a_coefficient_of_1_003_matters_in_bfloat16():
    assert torch.tensor(1.003).bfloat16() == 1
    model = tiny_variant("bert").to(torch.bfloat16)
    coefficients = UnitCoefficients.attach(model)
    seen = {}
    reader = model.get_submodule(coefficients.units[1].output)
    reader.register_forward_pre_hook(lambda _, args: seen.setdefault("scaled", args[0]))
    model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda _, args, output: seen.setdefault("plain", output)
    )
    set_values(coefficients, {one.key: torch.full((one.count,), 1.003) for one in coefficients.units})
    model(**tiny_inputs(model))
    assert seen["scaled"].dtype == torch.bfloat16
    assert torch.equal(seen["scaled"], (seen["plain"].float() * 1.003).bfloat16())
    changed = (seen["scaled"] != seen["plain"]).float().mean()
    assert 0.2 < changed < 0.8  # some round back; times a coefficient in bf16, all would be equal


class OneLayer(nn.Module):
    """Two heads of width 1 and two neurons that are read by one output each; the smallest thing with units."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": 2, "model_type": "one_layer"})()
        layer = nn.Module()
        for name, size in {"attend": (2, 2), "join": (2, 1), "up": (1, 2), "down": (2, 1)}.items():
            layer.add_module(name, nn.Linear(*size, bias=False))
        self.layers = nn.ModuleList([layer])

    def forward(self, values):
        layer = self.layers[0]
        return layer.down(layer.up(layer.join(layer.attend(values))))


def test_gradients_by_hand():
    model = OneLayer()
    layer = model.layers[0]
    with torch.no_grad():
        layer.attend.weight.copy_(torch.eye(2))
        layer.join.weight.copy_(torch.tensor([[3.0, 5.0]]))
        layer.up.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.down.weight.copy_(torch.tensor([[2.0, 0.5]]))
    table = UnitTable("layers", {"attend": 1}, "join", {"up": 1}, "down")
    coefficients = UnitCoefficients.attach(model, table)
    set_values(coefficients, {"layers.0.heads": torch.tensor([1.0, -2.0]), "layers.0.neurons": torch.tensor([0, 4.0])})
    # y = (2 a0 - 0.5 a1) (3 c0 x0 + 5 c1 x1), over both rows: x = (1, 2) and (-1, 1)
    output = model(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
    assert output.flatten().tolist() == [-2 * (3 - 20), -2 * (-3 - 10)]
    output.sum().backward()
    heads, neurons = coefficients.values
    assert heads.grad.tolist() == [-2 * 3 * (1 - 1), -2 * 5 * (2 + 1)]
    assert neurons.grad.tolist() == [2 * (-17 - 13), -0.5 * (-17 - 13)]
    coefficients.add_l1_gradient(0.25)
    assert heads.grad.tolist() == [0.25, -30.25]
    assert neurons.grad.tolist() == [-60, 15.25]  # the sign of zero is zero
    signed, absolute = coefficients.scores(), coefficients.scores("absolute")
    assert signed["layers.0.heads"].tolist() == [1, -2]
    assert absolute["layers.0.heads"].tolist() == [1, 2]


@pytest.mark.parametrize("part", [1 << 18, 200, 1])
def test_gradients_are_those_of_autograd(part, monkeypatch):
    """However the rows are parted, and in double precision against finite differences."""
    monkeypatch.setattr(module_under_test, "PART", part)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(24, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module_under_test._Scale.apply, (values, scale))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float64, 1e-12)):
        pair = (values.detach().to(dtype).requires_grad_(), scale.detach().float().requires_grad_())
        given = torch.randn(values.shape, generator=generator).to(dtype)
        plain = torch.autograd.grad((pair[0] * pair[1]).to(dtype), pair, given)
        found = torch.autograd.grad(module_under_test._Scale.apply(*pair), pair, given)
        assert [one.dtype for one in found] == [dtype, torch.float32]
        assert torch.equal(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1], rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_those_of_the_weights(variant):
    """A coefficient scales the columns that read its unit, so c * dL/dc is the sum of W * dL/dW over them."""
    model, coefficients = attached(variant)
    model(**tiny_inputs(model))[0].square().sum().backward()
    for one, value in zip(coefficients.units, coefficients.values, strict=True):
        module = model.get_submodule(one.output)
        products = module.weight * module.weight.grad
        by_column = products.sum(1 if isinstance(module, Conv1D) else 0).reshape(one.count, -1).sum(1)
        torch.testing.assert_close(value * value.grad, by_column, rtol=1e-4, atol=1e-4 * by_column.abs().max().item())
        assert value.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, coefficients = attached("bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    plain = gradients(model, coefficients)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.get_submodule(coefficients.units[0].output).register_forward_hook(lambda *_: calls.append(1))
    assert_same(gradients(model, coefficients), plain)
    assert len(calls) == 2  # forward, and again in backward


def test_compiled_gives_the_same_gradients():
    model, coefficients = attached("bert", num_hidden_layers=1)
    plain = gradients(model, coefficients)
    assert_same(gradients(model, coefficients, torch.compile(model, backend="aot_eager")), plain)


def test_autocast_keeps_gradients_of_coefficients_in_fp32():
    model, coefficients = attached("bert")
    plain = gradients(model, coefficients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(model, coefficients)
    for one, value in zip(coefficients.units, coefficients.values, strict=True):
        assert value.grad.dtype == torch.float32
        assert torch.cosine_similarity(rounded[one.key], plain[one.key], dim=0) > 0.99
    assert not torch.equal(rounded["embedding"], plain["embedding"])


def test_refusals():
    model = tiny_model("bert")
    coefficients = UnitCoefficients.attach(model)
    with pytest.raises(ValueError, match="has coefficients already. Detach them"):
        UnitCoefficients.attach(torch.compile(model))
    with pytest.raises(RuntimeError, match="`encoder.layer.0.heads` got no gradient: the model does not use them"):
        coefficients.add_l1_gradient(1e-4)
    coefficients.detach(model)
    UnitCoefficients.attach(model)
    with pytest.raises(ValueError, match="Heads and neurons are known for"):
        UnitCoefficients.attach(tiny_model("opt"))
    assert len(UnitCoefficients.attach(tiny_model("opt"), OPT_TABLE).values) == 4
