"""What the keeper accepts, what it costs, and how it lets go."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sparse_hf.training.mask_keeper import MaskKeeper


def matrix() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


HALF = {"weight": torch.tensor([True, True, False, False]).repeat(4, 1)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_pruned_weights_become_plus_zero_at_once():
    model = matrix()
    with torch.no_grad():
        model.weight.fill_(-1.0)
    MaskKeeper(torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters()), HALF)
    assert model.weight.tolist() == [[-1.0, -1.0, 0.0, 0.0]] * 4
    assert not model.weight[:, 2:].signbit().any()


def test_masks_come_back_as_a_copy_and_the_sparsity_is_exact():
    model = matrix()
    keeper = MaskKeeper(torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters()), HALF)
    keeper.masks()["weight"].fill_(True)
    assert torch.equal(keeper.masks()["weight"], HALF["weight"])
    assert keeper.sparsity == 0.5


def test_masks_take_one_byte_per_weight():
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    keeper = MaskKeeper(optimizer, dict(model.named_parameters()), {"weight": torch.rand(64, 64) < 0.5})
    held = [
        value
        for attribute in vars(keeper).values()
        for value in (attribute.values() if isinstance(attribute, dict) else [attribute])
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
    ]
    assert sum(value.untyped_storage().nbytes() for value in held) == 64 * 64
    assert not any("mask" in name for name in model.state_dict())


def test_detach_removes_every_hook():
    model = matrix()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = MaskKeeper(optimizer, dict(model.named_parameters()), HALF)
    step(model, optimizer)
    assert (model.weight[:, 2:] == 0).all()
    keeper.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    step(model, optimizer)
    assert (model.weight[:, 2:] != 0).any()
    assert torch.equal(keeper.masks()["weight"], HALF["weight"])


def test_it_looks_through_accelerate():
    model = matrix()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = Accelerator(cpu=True).prepare(inner)
    assert wrapped is not inner
    MaskKeeper(wrapped, dict(model.named_parameters()), HALF)
    assert len(inner._optimizer_step_post_hooks) == 1
    step(model, wrapped)
    assert (model.weight[:, 2:] == 0).all()


def test_a_weight_that_the_optimizer_does_not_step_is_refused():
    model = nn.Sequential(matrix(), matrix())
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    masks = {"0.weight": HALF["weight"], "1.weight": HALF["weight"]}
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"SGD does not hold `1\.weight`.*ZeRO"):
        MaskKeeper(optimizer, dict(model.named_parameters()), masks)
    assert torch.equal(model[0].weight, before)
    assert not optimizer._optimizer_step_post_hooks


def test_a_frozen_weight_is_masked_without_an_optimizer():
    model = nn.Sequential(matrix(), matrix())
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    masks = {"0.weight": HALF["weight"], "1.weight": HALF["weight"]}
    MaskKeeper(optimizer, dict(model.named_parameters()), masks)
    assert (model[1].weight[:, 2:] == 0).all()


class Shard(torch.Tensor):
    """Stands for DTensor and quantised tensors, which are subclasses too."""


def test_a_sharded_weight_is_refused():
    model = matrix()
    model.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Shard))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must be plain tensors, got a Shard for `weight`"):
        MaskKeeper(optimizer, dict(model.named_parameters()), HALF)


def test_a_tied_weight_is_masked_once_and_stays_tied():
    model = nn.Sequential(matrix(), matrix())
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    MaskKeeper(optimizer, dict(model.named_parameters()), {"0.weight": HALF["weight"]})
    step(model, optimizer)
    assert model[1].weight is model[0].weight
    assert (model[1].weight[:, 2:] == 0).all()
