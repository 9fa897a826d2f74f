"""The whole model, put together again from a file and what was kept of it without weights."""

import pytest
import torch

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from sparse_hf.training.early_bird_shards import fill_from, without_weights
from sparse_hf.training.snapshot import save_snapshot
from tiny_models import tiny_model
from training.tiny_early_bird import whole_bert
from training.tiny_training import assert_same, tensors


# Tied embeddings and Conv1D; buffers that are not saved; a position bias that layers share.
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_the_same_is_cut_out_of_the_file(tmp_path, family):
    model = tiny_model(family, "T5EncoderModel" if family == "t5" else "causal_lm")
    next(model.parameters()).requires_grad_(False)
    save_snapshot(model, tmp_path / "start.safetensors")
    empty = without_weights(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    expected = tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    whole = fill_from(empty, tmp_path / "start.safetensors")
    assert_same(tensors(whole), expected)
    assert_same(dict(whole.named_buffers()), dict(model.named_buffers()))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in whole.named_parameters()] == names  # ties are ties
    assert [one.requires_grad for one in whole.parameters()] == [one.requires_grad for one in model.parameters()]
    kept = {one.key: torch.arange(one.count) < (one.count + 1) // 2 for one in find_units(whole)}
    smaller = cut_units(whole, kept)
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        for name, tensor in expected.items():
            model.state_dict()[name].copy_(tensor)
        assert torch.equal(smaller.eval()(ids)[0], cut_units(model, kept).eval()(ids)[0])


def test_a_snapshot_of_another_model(tmp_path):
    save_snapshot(whole_bert(intermediate_size=48), tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match="saved from another model: `bert.encoder.layer.0.intermediate.dense.bias`"):
        fill_from(without_weights(whole_bert()), tmp_path / "start.safetensors")
