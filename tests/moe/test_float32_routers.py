"""Routers compute in float32 in every family, and nothing else changes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.test_router_logits import STOCK, stock
from moe.test_usage import FAMILIES
from sparse_hf.moe.float32_routers import Float32Routers
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.moe.router_logits import RouterReader, check_linear
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense
from tiny_models import tiny_inputs


def assert_float32(model, autocast):
    """Logits are the exact products of what the model holds in half precision."""
    model.train()
    inputs = tiny_inputs(model)
    reader = RouterReader(model)
    before = {name: (one, one.dtype) for name, one in model.named_parameters()}
    with torch.no_grad():
        for weight, _ in reader.linear_routers():
            weight.normal_(generator=torch.Generator().manual_seed(0))
    hooks = Float32Routers(reader.routers)
    with reader.listening() as routings, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs).logits
    for one, (weight, bias) in zip(routings, reader.linear_routers(), strict=True):
        assert one.logits.dtype == torch.float32
        bias = None if bias is None else bias.float()
        expected = torch.nn.functional.linear(one.inputs.float(), weight.float(), bias)
        assert torch.allclose(one.logits, expected, rtol=1e-5, atol=1e-6)
        check_linear(one, weight, bias, "router")
    (output.float().square().sum() + sum(one.logits.square().sum() for one in routings)).backward()
    assert all(weight.grad.abs().sum() > 0 for weight, _ in reader.linear_routers())
    # The same parameters, under the same names in the same order, of the same types.
    after = {name: (one, one.dtype) for name, one in model.named_parameters()}
    assert list(after) == list(before)
    assert all(after[name][0] is before[name][0] and after[name][1] == before[name][1] for name in before)
    hooks.detach()
    reader.detach()


@pytest.mark.parametrize("model_type", STOCK)
def test_stock_families(model_type):
    assert_float32(stock(model_type).bfloat16(), autocast=False)
    assert_float32(stock(model_type), autocast=True)


@pytest.mark.parametrize("target", [one for one in TARGETS if one not in STOCK])
def test_families_that_are_upcycled_to(tmp_path, target):
    save_dense(tmp_path / "dense", FAMILIES[target])
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, check_tokens=0, progress=False, target=target)
    assert_float32(AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16), autocast=False)


def test_weights_come_back_when_a_router_fails():
    model = stock("mixtral").bfloat16()
    gate = model.model.layers[0].mlp.gate
    weight = gate.weight
    hooks = Float32Routers([gate])
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        gate(torch.ones(3, 5))
    assert gate.weight is weight
    assert not torch.is_autocast_enabled("cpu")
    hooks.detach()
    assert gate(torch.ones(3, 16).bfloat16())[0].dtype == torch.bfloat16  # as before


def test_recomputation_computes_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = stock("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        hooks = Float32Routers(RouterReader(model).routers)
        with torch.autocast("cpu", torch.bfloat16):
            model(**tiny_inputs(model)).logits.float().square().sum().backward()
        hooks.detach()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)
