"""Rewinding: every parameter and persistent buffer, bit for bit, from a file that cannot alias live weights."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sparse_hf.storage.torch_dtypes import TORCH_DTYPES
from sparse_hf.training.snapshot import _run, restore_snapshot, save_snapshot
from tiny_models import tiny_model
from training.tiny_training import assert_same, same, tensors, tiny_classifier


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor + 1 if tensor.is_floating_point() else tensor)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "mixtral"])
def test_every_tensor_comes_back(tmp_path, family):
    model = tiny_model(family, "sequence_classification")
    start = tensors(model)
    save_snapshot(model, tmp_path / "start.safetensors")
    shake(model)
    assert not same(start, tensors(model))
    restore_snapshot(model, tmp_path / "start.safetensors")
    assert_same(start, tensors(model))


def test_odd_bits_buffers_and_tied_weights_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
        model[1].running_mean.fill_(7)
        model[1].num_batches_tracked.fill_(3)
    bits = model[0].weight.detach().view(torch.int32).clone()
    save_snapshot(model, tmp_path / "start.safetensors")
    shake(model)
    restore_snapshot(model, tmp_path / "start.safetensors")
    assert torch.equal(model[0].weight.detach().view(torch.int32), bits)
    assert model[2].weight is model[0].weight
    assert model[1].running_mean.tolist() == [7.0] * 4
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_buffers_of_every_dtype_come_back(tmp_path, dtype):
    model = nn.Module()
    model.register_buffer("numbers", torch.tensor([0, 1, 0, 1]).to(dtype))
    bits = model.numbers.view(torch.uint8).clone()
    save_snapshot(model, tmp_path / "start.safetensors")
    model.numbers.view(torch.uint8).zero_()
    restore_snapshot(model, tmp_path / "start.safetensors")
    assert torch.equal(model.numbers.view(torch.uint8), bits)


def test_only_what_is_wanted_is_saved_and_restored(tmp_path):
    model = tiny_classifier()
    start = tensors(model)
    save_snapshot(model, tmp_path / "head.safetensors", lambda name: name.startswith("classifier"))
    shake(model)
    restore_snapshot(model, tmp_path / "head.safetensors", lambda name: name.startswith("classifier"))
    for name, value in tensors(model).items():
        assert torch.equal(value, start[name]) == name.startswith("classifier"), name


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_another_model_is_refused_and_unchanged(tmp_path, changes):
    save_snapshot(tiny_classifier(), tmp_path / "start.safetensors")
    other = tiny_classifier(seed=1, **changes)
    before = tensors(other)
    with pytest.raises(ValueError, match="was saved from another model"):
        restore_snapshot(other, tmp_path / "start.safetensors")
    assert_same(before, tensors(other))


def test_another_precision_is_refused(tmp_path):
    """Copied into bfloat16, the snapshot would be rounded, and rewinding would not be exact."""
    save_snapshot(tiny_classifier(), tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match="was saved from another model"):
        restore_snapshot(tiny_classifier().bfloat16(), tmp_path / "start.safetensors")


@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 3, 4), ()])
def test_of_a_stored_tensor_any_run_can_be_read(tmp_path, shape):
    """As ZeRO cuts tensors: from anywhere to anywhere in the flat order."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))
    flat = model.weight.detach().reshape(-1)
    save_snapshot(model, tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        for start in range(flat.numel() + 1):
            for end in range(start, flat.numel() + 1):
                run = _run(file.get_slice("weight"), start, end - start)
                assert torch.equal(run, flat[start:end]), (start, end)


def test_a_rank_that_does_not_write_leaves_no_file(tmp_path):
    save_snapshot(tiny_classifier(), tmp_path / "start.safetensors", writes=False)
    assert not list(tmp_path.iterdir())
