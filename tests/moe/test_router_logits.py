"""Routers are read in every family, once per token, with the graph that gradients need."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from moe.test_usage import FAMILIES
from sparse_hf import RouterConfig
from sparse_hf.algorithms.balance import token_probabilities
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.moe.router_logits import EXPERT_COUNTS, RouterReader, check_linear, layer_number
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense
from tiny_mixtures import VARIANTS, convert, tiny_dense
from tiny_models import tiny_config, tiny_inputs, tiny_model


SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
SMALL |= dict(vocab_size=96, num_experts_per_tok=2, pad_token_id=0)
DEEPSEEK = dict(SMALL, n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=0, n_group=1, topk_group=1)
DEEPSEEK |= dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
STOCK = {
    "mixtral": dict(SMALL, num_local_experts=4),
    "qwen2_moe": dict(SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_moe": dict(SMALL, num_experts=4, moe_intermediate_size=16, norm_topk_prob=False),
    "olmoe": dict(SMALL, num_experts=4),
    "phimoe": dict(SMALL, num_local_experts=4),
    "gpt_oss": dict(SMALL, num_local_experts=4),
    "deepseek_v2": dict(DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": dict(DEEPSEEK, n_shared_experts=1),
}


def stock(model_type):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **STOCK[model_type]))


def read(model, inputs):
    reader = RouterReader(model)
    with reader.listening() as routings:
        outputs = model(**inputs)
    reader.detach()
    return reader, routings, outputs


def assert_read(model, inputs):
    """Logits are the routers' weights times their inputs, have a graph, and explain the choice."""
    model.train()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] == 4 and ("gate" in name or "router" in name):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    reader, routings, _ = read(model, inputs)
    assert reader.experts == 4
    assert len(routings) == len(reader.names) == 2
    for name, one, (weight, bias) in zip(reader.names, routings, reader.linear_routers(), strict=True):
        check_linear(one, weight, bias, name)
        with pytest.raises(ValueError, match="must be its trained weight times its input"):
            check_linear(one, weight.roll(1, 0), bias, name)
        assert one.logits.requires_grad
        assert not one.inputs.requires_grad
        (gradient,) = torch.autograd.grad(token_probabilities(one.logits, reader.scores)[:, 0].sum(), weight)
        assert gradient.abs().sum() > 0
        # Without biases of the choice, which all are zero here, the largest probabilities are chosen.
        best = token_probabilities(one.logits, reader.scores).topk(one.chosen.shape[1]).indices
        assert torch.equal(best.sort().values, one.chosen.sort().values)


@pytest.mark.parametrize("model_type", STOCK)
def test_stock_families(model_type):
    model = stock(model_type)
    assert_read(model, tiny_inputs(model))


@pytest.mark.parametrize("target", TARGETS)
def test_families_that_are_upcycled_to(tmp_path, target):
    save_dense(tmp_path / "dense", FAMILIES[target])
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, check_tokens=0, progress=False, target=target)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert_read(model, tiny_inputs(model))


@pytest.mark.parametrize("variant", ["gpt2", "bert", "roberta", "vit", "t5"])
def test_mixtures_of_ours(tmp_path, variant):
    model = tiny_dense(variant)
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", check_tokens=0)
    mixture = getattr(transformers, VARIANTS[variant][3]).from_pretrained(tmp_path / "moe")
    assert_read(mixture, tiny_inputs(model))


def test_every_family_above_is_tested():
    tested = {*STOCK, *TARGETS, *(f"sparse_hf_mixture_{one}" for one in ("gpt2", "bert", "roberta", "vit", "t5"))}
    assert tested == set(EXPERT_COUNTS)


def test_recomputation_is_not_read_and_gradients_are_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = stock("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].mlp.gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        reader = RouterReader(model)
        with reader.listening() as routings:
            outputs = model(**tiny_inputs(model))
        sum((one.logits.softmax(-1).square().sum() for one in routings), outputs.logits.sum()).backward()
        assert len(routings) == 2
        assert len(calls) == (2 if checkpointing else 1)  # the recomputation took place
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-6), name


def test_dense_models_are_refused():
    with pytest.raises(ValueError, match="got a model of type 'llama': it is dense"):
        RouterReader(tiny_model("llama", "causal_lm"))
    dense = transformers.Qwen3MoeConfig(**STOCK["qwen3_moe"], mlp_only_layers=[0, 1])
    with pytest.raises(ValueError, match="all its layers are dense"):
        RouterReader(AutoModelForCausalLM.from_config(dense))


def test_what_is_not_read_is_an_error():
    model = stock("mixtral")
    reader = RouterReader(model)
    twice = [tiny_inputs(model)] * 2
    with pytest.raises(ValueError, match="must be called once in a forward pass, got 2 and 2"), reader.listening():
        [model(**one) for one in twice]
    with pytest.raises(ValueError, match="got 0 and 0 calls"), reader.listening():
        pass
    with reader.listening() as routings:  # and it goes on afterwards
        model(**tiny_inputs(model))
    assert len(routings) == 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_every_expert_for_every_token(family):
    """Logits and weights then have the same shape."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, num_experts_per_tok=4))
    reader, routings, _ = read(model, tiny_inputs(model))
    for name, one, (weight, bias) in zip(reader.names, routings, reader.linear_routers(), strict=True):
        check_linear(one, weight, bias, name)
        assert torch.equal(one.chosen.sort(dim=-1).values, torch.arange(4).expand(16, 4))


@pytest.mark.parametrize("kind", ["expert_choice", "hash"])
def test_routers_of_ours_without_a_choice_by_logits(kind, tmp_path):
    tiny_dense("bert").save_pretrained(tmp_path / "dense")
    top_k = 1 if kind == "hash" else 2
    convert(tmp_path / "dense", tmp_path / "moe", router=RouterConfig(kind), top_k=top_k, check_tokens=0)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=f"kind '{kind}' have no choice by logits"):
        RouterReader(model)


def test_frozen_routers_and_others_than_linear_ones():
    model = stock("mixtral")
    first, second = (layer.mlp.gate for layer in model.model.layers)
    first.weight.requires_grad_(False)
    assert RouterReader(model).linear_routers() == [None, (second.weight, None)]
    second.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp` weight, scale are trained.*`modules_to_save`"):
        RouterReader(model).linear_routers()


def test_the_layer_of_a_block():
    assert layer_number("model.layers.12.mlp") == 12
    assert layer_number("encoder.block.3.layer.1.ffn") == 3
