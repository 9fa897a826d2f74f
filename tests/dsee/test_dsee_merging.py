"""Merging writes the sum into the frozen weights; unmerging and unloading give them back to the bit."""

import pytest
import torch
from peft import get_peft_model

from dsee.tiny_dsee import (
    FAMILY,
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
from sparse_hf.dsee.model import dsee_sparsity
from tiny_models import tiny_inputs


def two_adapters(family):
    """The first active; they differ in mask and support."""
    model = dsee_model(family, base_sparsity=0.3)
    model.add_adapter("other", dsee_config(family, base_sparsity=0.6, support="random"))
    return stir(model, seed=5, adapter="other")


@FAMILY
def test_merging_changes_nothing_and_unmerging_gives_the_same_bits(family):
    model = dsee_model(family)
    before, expected = bits(model), logits(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
        assert not torch.equal(logits(model), logits(base_model(family)))
        model.unmerge_adapter()
        assert_same(bits(model), before)
        assert torch.equal(logits(model), expected)
    assert_same(dict(model.unload().state_dict()), bits(base_model(family)))


@FAMILY
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_a_stock_model(family, merged_before):
    model = dsee_model(family)
    expected = logits(model)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model(family))
    assert merged.state_dict().keys() == base_model(family).state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


@FAMILY
@pytest.mark.parametrize("merged", [False, True])
def test_unloading_gives_the_frozen_model(family, merged):
    model = dsee_model(family)
    if merged:
        model.merge_adapter()
    assert_same(dict(model.unload().state_dict()), bits(base_model(family)))


@FAMILY
def test_disabling_unmerges(family):
    model = dsee_model(family)
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(bits(model), bits(base_model(family)))
    assert torch.equal(logits(model), expected)


@FAMILY
def test_an_adapter_that_is_not_active_is_merged_with_its_own_mask(family):
    model = two_adapters(family)
    first, before = logits(model), bits(model)
    model.set_adapter("other")
    second = logits(model)
    model.set_adapter("default")
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert_same(bits(model), before)
    assert torch.equal(logits(model), first)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["other"])), second, atol=1e-5, rtol=0)


@FAMILY
@pytest.mark.parametrize("in_turn", [False, True])
def test_two_adapters_are_merged_as_they_are_active_together(family, in_turn):
    model = two_adapters(family)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.base_model.set_adapter("default")
    before = bits(model)
    if in_turn:
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(["other"])
    else:
        model.merge_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert_same(bits(model), before)


def test_merge_and_unload_adds_to_what_is_merged():
    model = two_adapters("bert")
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.base_model.set_adapter("default")
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


@FAMILY
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_sparse_merge_keeps_exactly_the_zeros_of_s1(family, merged_before, caplog):
    model, plain = dsee_model(family, base_sparsity=0.4), base_model(family)
    dense = {
        name: effective(layer, plain.get_submodule(name[17:]).weight.data) for name, layer in layers(model).items()
    }
    masks = {name: layer.sparse_hf_dsee_baked.mask(layer.weight).clone() for name, layer in layers(model).items()}
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload(sparse=True)
    for name, mask in masks.items():
        weight = merged.get_submodule(name[17:]).weight
        assert torch.equal(weight != 0, mask)
        torch.testing.assert_close(weight.double(), dense[name] * mask, atol=1e-6, rtol=1e-5)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.4 * total)
    shares = [float((dense[name] * ~mask).norm() / dense[name].norm()) for name, mask in masks.items()]
    said = f"{sum(shares) / len(shares):.2g} of a merged matrix's norm on average, {max(shares):.2g} at most"
    assert said in caplog.text


@FAMILY
def test_a_sparse_merge_says_what_it_does_to_the_output(family, caplog):
    model = dsee_model(family, base_sparsity=0.4)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        merged = model.merge_and_unload(sparse=True, batch={**inputs, "labels": torch.zeros(1)})
        change = (merged(**inputs)[0] - before).norm() / before.norm()
    assert change > 1e-3
    assert f"The output of the given batch changed by {float(change):.2g} of its norm. Evaluate" in caplog.text


def test_sparsity_is_reported_before_and_after_merging():
    model = dsee_model("bert", r=0, nnz=20, base_sparsity=0.5, support="random")
    count = sum(layer.weight.numel() for layer in layers(model).values())
    filled = sum(
        int(
            (~layer.sparse_hf_dsee_baked.mask(layer.weight))
            .flatten()[layer.sparse_hf_dsee_indices["default"].long()]
            .sum()
        )
        for layer in layers(model).values()
    )
    assert filled > 0
    assert dsee_sparsity(model) == (0.5, (0.5 * count - filled) / count)
    assert dsee_sparsity(dsee_model("bert")).merged == 0.0
    with model.disable_adapter():
        assert dsee_sparsity(model).base == 0.0


@pytest.mark.parametrize("part", ["U", "values"])
def test_a_safe_merge_refuses_what_is_not_finite(part):
    model = dsee_model("bert")
    before = bits(model)
    layer = list(layers(model).values())[-1]
    getattr(layer, f"sparse_hf_dsee_{part}")["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert_same(bits(model), before)


def test_a_base_in_bfloat16_merges_within_its_precision_and_unmerges_exactly():
    model = stir(get_peft_model(base_model("llama").bfloat16(), dsee_config("llama"))).eval()
    before, expected = bits(model), logits(model)
    model.merge_adapter()
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers(model).values())
    torch.testing.assert_close(logits(model), expected, atol=0.02, rtol=0.05)
    model.unmerge_adapter()
    assert_same(bits(model), before)


def test_another_dtype_while_merged():
    model = dsee_model("bert")
    model.merge_adapter()
    model = model.bfloat16()
    model.unmerge_adapter()
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers(model).values())
    stock = model.unload()
    assert_same(dict(stock.state_dict()), bits(base_model("bert").bfloat16()))


def test_masks_changed_while_merged_come_into_force_when_unmerged():
    model = dsee_model("bert")
    layer = next(iter(layers(model).values()))
    model.merge_adapter()
    for seed in range(4):  # often enough for memory to be used again
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(layer.weight_shape, generator=generator) > 0.5
        layer.set_mask("default", mask)
    model.unmerge_adapter()
    assert torch.equal(layer.weight != 0, mask)
    assert adapter_tensors(model)
    assert_same(dict(model.unload().state_dict()), bits(base_model("bert")))


def test_w0_is_not_at_hand_while_merged():
    model = dsee_model("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged: unmerge them first"):
        next(iter(layers(model).values())).frozen_weight()
