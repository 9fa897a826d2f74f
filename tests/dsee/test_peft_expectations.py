"""What PEFT's users expect of every method: training, several adapters, switching, and the frozen model untouched."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dsee.tiny_dsee import (
    FAMILIES,
    FAMILY,
    NNZ,
    R,
    adapter_tensors,
    assert_same,
    base_model,
    bits,
    dsee_config,
    dsee_model,
    effective,
    layers,
    logits,
    stir,
)
from tiny_models import tiny_inputs


def train(model, steps=3, learning_rate=1e-2, **forward):
    """A few steps of AdamW with weight decay; returns the last gradients."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate, weight_decay=0.1)
    inputs = tiny_inputs(model.get_base_model())
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, **forward).logits.float().square().mean().backward()
        optimizer.step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@FAMILY
def test_it_begins_as_the_frozen_model(family):
    expected = logits(base_model(family))
    torch.testing.assert_close(logits(dsee_model(family, stirred=False, base_sparsity=0.0)), expected)
    assert not torch.allclose(
        logits(dsee_model(family, stirred=False, init_weights=False, base_sparsity=0.0)), expected
    )


@FAMILY
def test_only_the_adapter_is_trained_and_its_size_is_what_was_asked(family):
    model = dsee_model(family)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".sparse_hf_dsee_" in name for name in trainable)
    expected = 0
    for layer in layers(model).values():
        outputs, inputs = layer.out_features, layer.in_features
        expected += R * (outputs + inputs) + NNZ
    assert sum(p.numel() for p in trainable.values()) == expected
    assert model.get_nb_trainable_parameters()[0] == expected


@FAMILY
def test_the_function_is_the_formula(family):
    model, dense = dsee_model(family), base_model(family)
    for name, layer in layers(model).items():
        stock = dense.get_submodule(name.removeprefix("base_model.model."))
        stock.weight.data = effective(layer, stock.weight.data).float()
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(base_model(family)), atol=1e-3)


@FAMILY
@pytest.mark.parametrize("sizes", [{"r": 0}, {"nnz": 0}, {"nnz": 0, "base_sparsity": 0.0}], ids=str)
def test_parts_can_be_left_out(family, sizes):
    model = dsee_model(family, **sizes)
    kinds = {name.split(".")[-2] for name in adapter_tensors(model)}
    assert ("sparse_hf_dsee_U" in kinds) == (sizes.get("r") != 0)
    assert ("sparse_hf_dsee_indices" in kinds) == (sizes.get("nnz") != 0)
    assert ("sparse_hf_dsee_mask" in kinds) == ("base_sparsity" not in sizes)
    before = adapter_tensors(model)
    train(model)
    assert any(not torch.equal(before[name], now) for name, now in adapter_tensors(model).items())


@FAMILY
def test_training_with_weight_decay_leaves_the_base_bit_identical(family):
    original = bits(base_model(family))
    model = dsee_model(family, stirred=False)
    before = adapter_tensors(model)
    train(model.train())
    for name, now in adapter_tensors(model).items():
        fixed = "indices" in name or "mask" in name
        assert torch.equal(before[name], now) == fixed, name
    with model.disable_adapter():
        assert_same(bits(model), original)
    assert_same(dict(model.unload().state_dict()), original)


@FAMILY
def test_gradients_are_those_of_the_dense_matrix(family):
    model, dense = dsee_model(family), base_model(family)
    found = train(model, steps=1, learning_rate=0.0)
    stocks = {}
    for name, layer in layers(model).items():
        stocks[name] = dense.get_submodule(name.removeprefix("base_model.model."))
        stocks[name].weight.data = effective(layer, stocks[name].weight.data).float()
    dense(**tiny_inputs(dense)).logits.square().mean().backward()
    for name, layer in layers(model).items():
        gradient = stocks[name].weight.grad
        places, factor = layer.sparse_hf_dsee_indices["default"].long(), layer.sparse_hf_dsee_scaling["default"]
        values = found[f"{name}.sparse_hf_dsee_values.default"]
        torch.testing.assert_close(values, factor * gradient.flatten()[places], atol=1e-6, rtol=1e-3)
        oriented = gradient.t() if layer.input_first else gradient
        expected = factor * oriented @ layer.sparse_hf_dsee_V["default"].t()
        torch.testing.assert_close(found[f"{name}.sparse_hf_dsee_U.default"], expected, atol=1e-6, rtol=1e-3)


@FAMILY
def test_two_adapters_with_other_targets_and_masks(family):
    original = bits(base_model(family))
    model = dsee_model(family, base_sparsity=0.3)
    model.add_adapter("other", dsee_config(family, other=True, base_sparsity=0.6, r=3, nnz=7, support="random"))
    stir(model, seed=5, adapter="other")
    first = logits(model)
    alone = dsee_model(family, base_sparsity=0.3)
    assert torch.equal(first, logits(alone))
    model.set_adapter("other")
    second = logits(model)
    alone = get_peft_model(
        base_model(family), dsee_config(family, other=True, base_sparsity=0.6, r=3, nnz=7, support="random")
    ).eval()
    assert torch.equal(second, logits(stir(alone, seed=5)))
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    model.delete_adapter("other")
    assert_same(bits(model), original)


def test_two_active_adapters_intersect_their_masks_and_add_their_updates():
    model = dsee_model("bert", support="random")
    model.add_adapter("other", dsee_config("bert", base_sparsity=0.3, support="random", seed=3))
    stir(model, seed=5, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    dense = base_model("bert")
    for name, layer in layers(model).items():
        stock = dense.get_submodule(name.removeprefix("base_model.model."))
        w0 = stock.weight.data
        parts = [effective(layer, torch.zeros_like(w0), one) for one in ("default", "other")]
        both = [
            effective(layer, torch.ones_like(w0), one) - part
            for one, part in zip(("default", "other"), parts, strict=True)
        ]
        stock.weight.data = (w0 * both[0].round() * both[1].round() + parts[0] + parts[1]).float()
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)


@FAMILY
def test_disabling_gives_the_frozen_model_bit_for_bit(family):
    plain, model = base_model(family), dsee_model(family)
    adapted, own = logits(model), bits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
        assert_same(bits(model), bits(plain))
    assert torch.equal(logits(model), adapted)
    assert_same(bits(model), own)
    assert not torch.allclose(adapted, logits(plain), atol=1e-3)


@FAMILY
def test_modules_to_save_are_trained_whole(family):
    head = FAMILIES[family][4]
    model = dsee_model(family, modules_to_save=[head])
    original = bits(base_model(family))
    gradients = train(model)
    assert any(f"{head}.modules_to_save.default" in name for name in gradients)
    saved = [name for name in model.state_dict() if f"{head}.modules_to_save.default" in name]
    kept = [name for name in model.state_dict() if f"{head}.original_module" in name]
    assert saved
    for name in kept:
        stock = name.replace("base_model.model.", "").replace("original_module.", "")
        assert torch.equal(model.state_dict()[name], original[stock])
    assert any(
        not torch.equal(model.state_dict()[one], model.state_dict()[two])
        for one, two in zip(sorted(saved), sorted(kept), strict=True)
    )


@FAMILY
def test_all_linear_skips_the_head(family):
    task = {"task_type": "SEQ_CLS"} if family == "bert" else {}
    model = dsee_model(family, target_modules="all-linear", **task)
    plain = base_model(family)
    linears = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    heads = {n for n in linears if n in ("lm_head", "classifier")}
    assert heads
    assert {name.removeprefix("base_model.model.") for name in layers(model)} == linears - heads
    # A second one meets an adapted model.
    model.add_adapter("other", dsee_config(family, target_modules="all-linear"))
    assert all("other" in layer.sparse_hf_dsee_U for layer in layers(model).values())


@FAMILY
def test_a_bfloat16_base(family):
    model = get_peft_model(base_model(family).bfloat16(), dsee_config(family)).eval()
    before = bits(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert logits(stir(model)).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), logits(dsee_model(family)), atol=0.05, rtol=0.1)
    gradients = train(model)
    assert all(one.isfinite().all() for one in gradients.values())
    assert_same(bits(model), before)


@FAMILY
def test_gradient_checkpointing_gives_the_same_gradients(family):
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    no_dropout |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    gradients = []
    for checkpointed in (False, True):
        model = stir(get_peft_model(base_model(family, **no_dropout), dsee_config(family))).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients.append(train(model, steps=1))
    assert_same(*gradients)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@FAMILY
def test_copies_are_independent(family, duplicate):
    model = dsee_model(family)
    before = logits(model)
    twin = duplicate(model)
    assert torch.equal(logits(twin), before)
    train(twin)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    assert_same(dict(twin.unload().state_dict()), bits(base_model(family)))
    assert torch.equal(logits(model), before)
