"""Routers that are frozen or warmed up: what a step does to them, and to their moments."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from sparse_hf import RouterSchedule, RouterScheduleCallback
from sparse_hf.training.router_freezing import check_freezing
from training.tiny_balance import mixtral, trainer
from training.tiny_training import AtStep, tensors


STEPS = 6
ALONE = dict(fsdp=[], deepspeed=None, world_size=1, gradient_checkpointing=True, ddp_find_unused_parameters=None)
ADAMW = dict(optim="adamw_torch", weight_decay=0.1, learning_rate=1e-2, max_steps=STEPS, max_grad_norm=1.0)


def is_router(name):
    return ".gate." in name


def trained(tmp_path, schedule, **changes):
    """The trainer, and the routers' weights before and after each step."""
    model = mixtral()
    weights = [{name: one for name, one in tensors(model).items() if is_router(name)}]
    look = AtStep(lambda step, model, **_: weights.append({n: o for n, o in tensors(model).items() if is_router(n)}))
    callbacks = [RouterScheduleCallback(schedule), look] if schedule else [look]
    training = trainer(tmp_path, None, model, callbacks=callbacks, **{**ADAMW, **changes})
    training.train()
    return training, weights


def moved(weights):
    pairs = zip(weights[:-1], weights[1:], strict=True)
    return [any(not torch.equal(one[name], then[name]) for name in one) for one, then in pairs]


def test_frozen_until_and_from(tmp_path):
    training, weights = trained(tmp_path, RouterSchedule(frozen_until=2, frozen_from=5))
    assert moved(weights) == [False, False, True, True, True, False]
    # AdamW has counted the three steps that they were trained, not those in which they had no gradient.
    steps = {name: training.optimizer.state[one]["step"].item() for name, one in training.model.named_parameters()}
    assert {steps[name] for name in steps if is_router(name)} == {3}
    assert {steps[name] for name in steps if not is_router(name)} == {6}
    assert all(one.requires_grad for one in training.model.parameters())


def test_a_gradient_of_zero_would_not_have_done(tmp_path):
    """The control: weight decay moves what has a gradient, even if it is zero."""
    model = mixtral()
    routers = {name: one for name, one in model.named_parameters() if is_router(name)}
    for one in routers.values():
        one.register_hook(torch.zeros_like)
    before = tensors(model)
    trainer(tmp_path, None, model, **{**ADAMW, "max_steps": 1}).train()
    assert not any(torch.equal(one.detach(), before[name]) for name, one in routers.items())


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def stepped(optimizer_class, warmed_up):
    """A model after six steps with given gradients, in which routers are frozen once and then slow three times."""
    model = mixtral()
    named = list(model.named_parameters())
    routers = [one for name, one in named if is_router(name)]
    optimizer = OPTIMIZERS[optimizer_class](
        [{"params": [o for n, o in named if not is_router(n)]}, {"params": routers}]
    )
    callback = RouterScheduleCallback(RouterSchedule(frozen_until=1, warm_up_steps=3))
    events = [None, TrainerState(global_step=0, max_steps=STEPS), None]
    if warmed_up:
        callback.on_train_begin(SimpleNamespace(**ALONE), *events[1:], model=model)
    generator = torch.Generator().manual_seed(0)
    for step, rate in enumerate([0, 0.25, 0.5, 0.75, 1, 1]):
        for _, one in named:
            gradient = torch.randn(one.shape, generator=generator)
            one.grad = gradient if one.requires_grad and (rate or not any(one is other for other in routers)) else None
        if warmed_up:
            callback.on_pre_optimizer_step(*events)
        else:
            optimizer.param_groups[1]["lr"] = rate * 1e-2
        optimizer.step()
        if warmed_up:
            callback.on_optimizer_step(*events)
            events[1].global_step = step + 1
            callback.on_step_end(*events)
    return model


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_warm_up_is_a_smaller_learning_rate(optimizer_class):
    """The same weights as with a parameter group of the routers' own."""
    expected = tensors(stepped(optimizer_class, warmed_up=False))
    for name, one in tensors(stepped(optimizer_class, warmed_up=True)).items():
        assert torch.allclose(one, expected[name], atol=1e-6), name


def test_warm_up_in_a_trainer(tmp_path):
    _, slow = trained(tmp_path, RouterSchedule(warm_up_steps=1), max_steps=1)
    _, fast = trained(tmp_path, None, max_steps=1)
    for name, start in fast[0].items():
        assert torch.allclose(slow[1][name] - start, (fast[1][name] - start) / 2, atol=1e-6)


def test_a_resumed_training_depends_on_the_step_alone(tmp_path):
    model = mixtral()
    callback = RouterScheduleCallback(RouterSchedule(frozen_until=2, frozen_from=5))
    args, frozen = trainer(tmp_path, None, model).args, []
    for step in range(7):
        callback.on_train_begin(args, TrainerState(global_step=step, max_steps=7), None, model=model)
        frozen.append(not any(one.requires_grad for name, one in model.named_parameters() if is_router(name)))
    assert frozen == [True, True, False, False, False, True, True]


def test_refusals(tmp_path):
    model = mixtral()
    for name, one in model.named_parameters():
        one.requires_grad_(not is_router(name))
    training = trainer(tmp_path, None, model, callbacks=[RouterScheduleCallback(RouterSchedule(frozen_from=0))])
    with pytest.raises(ValueError, match="must have routers to train or freeze, but all are frozen"):
        training.train()
    with pytest.raises(TypeError, match="must be a RouterSchedule, got int"):
        RouterScheduleCallback(3)
    several = {**ALONE, "world_size": 2}
    with pytest.raises(ValueError, match="needs `ddp_find_unused_parameters=True`"):
        check_freezing(SimpleNamespace(**several))
    check_freezing(SimpleNamespace(**{**several, "ddp_find_unused_parameters": True}))
    with pytest.raises(ValueError, match="got FSDP or DeepSpeed"):
        check_freezing(SimpleNamespace(**{**several, "fsdp": ["full_shard"]}))
