"""Zeros of weights, gradients and moments under every torch optimizer."""

import math

import pytest
import torch
from torch import nn

from sparse_hf.training.mask_keeper import MaskKeeper
from training.tiny_training import assert_zeros


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False, fused=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.ndim == 2], lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    # LBFGS is left out: it keeps flat histories of all parameters and calls the closure several times in one step,
    # so that between two hooks there are many updates. A Trainer cannot drive it.
}


def small_model() -> nn.Module:
    """An oblong, a square and an unmasked matrix, with fixed random weights of both signs."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def some_masks(density: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (5, 6), "2.weight": (5, 5)}
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}


def keeper_of(model: nn.Module, optimizer: torch.optim.Optimizer, masks: dict) -> MaskKeeper:
    return MaskKeeper(optimizer, dict(model.named_parameters()), masks)


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(inputs).square().mean().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dense_steps", [0, 3])
def test_weights_and_moments_are_zero_after_every_step(name, dense_steps):
    model = small_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(dense_steps):
        backward(model, step)
        optimizer.step()
    masks = some_masks(0.6)
    keeper = keeper_of(model, optimizer, masks)
    assert_zeros(model, masks, optimizer)
    start = model[0].weight.detach().clone()
    for step in range(12):
        backward(model, 100 + step)
        optimizer.step()
        assert_zeros(model, masks, optimizer)
        if step == 5:  # a mid-training change, to a mask nested in the first
            masks = {key: mask & (some_masks(0.7, seed=1)[key]) for key, mask in masks.items()}
            keeper.set_masks(masks)
            assert_zeros(model, masks, optimizer)
    assert not torch.equal(model[0].weight, start)
    assert model[0].weight.isfinite().all()


@pytest.mark.parametrize("name", ["sgd momentum", "adamw foreach", "rmsprop"])
def test_kept_weights_train_as_if_the_pruned_ones_did_not_exist(name):
    """Against a model whose pruned gradients are zeroed and whose weights are multiplied by hand."""
    masks = some_masks(0.6)
    kept, by_hand = small_model(), small_model()
    first, second = (OPTIMIZERS[name](list(model.parameters())) for model in (kept, by_hand))
    keeper_of(kept, first, masks)
    for step in range(6):
        backward(kept, step)
        first.step()
        with torch.no_grad():
            for key, mask in masks.items():
                by_hand.get_parameter(key).mul_(mask)
        backward(by_hand, step)
        for key, mask in masks.items():
            by_hand.get_parameter(key).grad.mul_(mask)
        second.step()
    for key, mask in masks.items():
        assert torch.equal(kept.get_parameter(key)[mask], by_hand.get_parameter(key)[mask])


def test_dense_masks_change_no_bit():
    runs = []
    for with_keeper in (False, True):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if with_keeper:
            keeper_of(model, optimizer, {name: torch.ones_like(mask) for name, mask in some_masks(0.5).items()})
        for step in range(4):
            backward(model, step)
            optimizer.step()
        runs.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_gradients_are_masked_before_the_clip_norm():
    model, masks = small_model(), some_masks(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = keeper_of(model, optimizer, masks)
    backward(model, 0)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected = math.sqrt(sum(float((g * masks.get(name, 1)).square().sum()) for name, g in gradients.items()))
    unmasked = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    keeper.mask_gradients()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert norm == pytest.approx(expected, rel=1e-6)
    assert norm < 0.99 * unmasked
    assert torch.equal(model[0].weight.grad[masks["0.weight"]] != 0, torch.ones(int(masks["0.weight"].sum())).bool())


@pytest.mark.parametrize("masked_by_trainer", [True, False])
def test_gradients_are_masked_once_per_step(masked_by_trainer, monkeypatch):
    model, masks = small_model(), some_masks(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = keeper_of(model, optimizer, masks)
    calls = []
    original = MaskKeeper.mask_gradients
    monkeypatch.setattr(MaskKeeper, "mask_gradients", lambda self: (calls.append(1), original(self)))
    for step in range(3):
        backward(model, step)
        if masked_by_trainer:
            keeper.mask_gradients()
        optimizer.step()
    assert len(calls) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_bad_gradients_of_pruned_weights_go_nowhere(value):
    model, masks = small_model(), some_masks(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keeper = keeper_of(model, optimizer, masks)
    for step in range(3):
        backward(model, step)
        model[0].weight.grad[~masks["0.weight"]] = value
        keeper.mask_gradients()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        optimizer.step()
        assert_zeros(model, masks, optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_widths_and_a_transposed_weight(dtype):
    model = small_model().to(dtype)
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    masks = some_masks(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keeper_of(model, optimizer, masks)
    for step in range(3):
        model.zero_grad()
        model(torch.randn(7, 6, generator=torch.Generator().manual_seed(step)).to(dtype)).square().mean().backward()
        optimizer.step()
        assert_zeros(model, masks, optimizer)
