"""What a careful reader found: ties, other base weights, inner adapters, DDP's buffers, typos, the model card."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dsee.tiny_dsee import base_model, dsee_config, dsee_model, layers, logits, stir
from sparse_hf import cut_heads, dsee_sparsity
from sparse_hf.dsee.masks import adapted_layers, mask_by_update


@pytest.mark.parametrize("r", [0, 2])
def test_without_updates_the_frozen_weights_rank(r):
    """A fresh adapter has no updates, and one with r=0 nearly none: ties must not empty the last matrices."""
    model = dsee_model("bert", stirred=r == 0, r=r, nnz=20, base_sparsity=0.0)
    mask_by_update(model, "default", 0.5)
    held = adapted_layers(model, "default").values()
    shares = [float((layer.weight == 0).float().mean()) for layer in held]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.01)
    assert max(shares) < 0.6
    for layer in held:
        values = layer.get_delta_weight("default").detach()
        assert not ((layer.weight == 0) & (values != 0)).any()  # what has an update stays


def test_nothing_of_the_mask_is_a_buffer_that_ddp_sends():
    model = dsee_model("bert")
    weights = sum(layer.weight.numel() for layer in layers(model).values())
    sent = sum(one.numel() * one.element_size() for name, one in model.named_buffers() if "sparse_hf" in name)
    assert sent <= weights / 8 + 4 * 20 * len(layers(model)) + 8 * len(layers(model))


def test_base_weights_loaded_under_a_mask_are_masked():
    model, other = dsee_model("bert"), base_model("bert", seed=5)
    with torch.no_grad():
        for name, layer in layers(model).items():
            layer.weight.copy_(other.get_submodule(name.removeprefix("base_model.model.")).weight)
    model.train()
    assert dsee_sparsity(model).base == 0.5
    base = model.unload()
    for name, tensor in base.state_dict().items():
        if any(part in name for part in ("query", "value")) and name.endswith("weight"):
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_same_zeros_written_again_lose_nothing():
    """As DDP does when it wraps a model."""
    model, start = dsee_model("bert"), base_model("bert").state_dict()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.weight.copy_(layer.weight.clone())
    model.train()
    base = model.unload()
    assert all(torch.equal(tensor, start[name]) for name, tensor in base.state_dict().items())


def test_moved_to_another_dtype_the_weight_still_comes_back():
    model = dsee_model("bert").to(torch.bfloat16).train().eval()
    base, start = model.unload(), base_model("bert").to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in base.state_dict().items())


def test_an_adapter_inside_still_counts():
    base = base_model("bert")
    inner = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    tuned = get_peft_model(base, inner).base_model.model.eval()
    before = logits(tuned)
    outer = get_peft_model(tuned, dsee_config("bert", base_sparsity=0.0)).eval()
    torch.testing.assert_close(logits(outer), before)
    assert not torch.equal(logits(stir(outer)), before)


def test_a_hook_on_the_base_layer_is_called():
    model, seen = dsee_model("bert"), []
    plain = logits(model)
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), plain)
    assert len(seen) == len(layers(model))


def test_masked_modules_that_match_nothing():
    with pytest.raises(ValueError, match=r"must name modules of the model, got \['keyy'\]"):
        dsee_model("bert", masked_modules=["keyy"])


def test_the_model_card_says_what_to_install(tmp_path):
    dsee_model("bert").save_pretrained(tmp_path)
    dsee_model("bert").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import sparse_hf") == 1


def test_a_cut_that_cannot_be_leaves_the_model_whole():
    model = dsee_model("bert", nnz=700, base_sparsity=0.0, target_modules=["query"])
    before = logits(model)
    size = next(iter(layers(model).values())).weight.numel()
    assert size // 2 < 700 <= size
    with pytest.raises(ValueError, match="what the cut leaves of"):
        cut_heads(model, 0.5)
    assert torch.equal(logits(model), before)


def test_cut_with_an_n_m_mask_is_saved_and_loaded(tmp_path):
    smaller = cut_heads(dsee_model("bert", base_sparsity=0.0, base_pattern="2:4"), 0.5).eval()
    smaller.save_pretrained(tmp_path / "adapter")
    smaller.get_base_model()
    expected = logits(smaller)
    base = smaller.unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), expected)
