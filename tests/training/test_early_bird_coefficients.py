"""How are the coefficients trained: their optimizer group, their L1 gradient, their dtype?"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from sparse_hf.tickets.coefficients import UnitCoefficients
from sparse_hf.training.early_bird_search import EarlyBirdSearch
from training.tiny_early_bird import KEYS, bird_trainer, early_bird, whole_bert
from training.tiny_training import AtStep


class Watch(TrainerCallback):
    """During the search: the optimizer's groups, and every coefficient's gradient before and in the optimizer step."""

    def __init__(self) -> None:
        self.groups, self.before, self.inside, self.values = [], [], [], []
        self.trained = []  # groups of the third stage

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.searching = hasattr(model, "sparse_hf_coefficients")
        if not self.searching:
            self.trained = [dict(group) for group in optimizer.optimizer.param_groups]
            return
        self.coefficients = list(model.sparse_hf_coefficients.parameters())
        self.weights = [one for name, one in model.named_parameters() if "sparse_hf" not in name]
        optimizer.optimizer.register_step_pre_hook(lambda *_: self.look(self.inside))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.searching:
            self.look(self.before)
            self.values.append([one.detach().clone() for one in self.coefficients])

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if self.searching:
            self.groups.append([dict(group) for group in optimizer.optimizer.param_groups])

    def look(self, seen: list) -> None:
        seen.append([one.grad.clone() for one in self.coefficients])


def searched(folder, model=None, compute_loss=None, config_changes=None, **options):
    """A search of three steps, and what was seen in it."""
    watch = Watch()
    config = early_bird(**{"draw_at": 3, "l1": 0.25, **(config_changes or {})})
    trainer = bird_trainer(folder, config, model, callbacks=[watch], **options)
    trainer.compute_loss_func = compute_loss
    trainer.train()
    return watch, trainer


def no_task(outputs, labels, num_items_in_batch=None):
    """A loss that teaches nothing."""
    return outputs.logits.sum() * 0


@pytest.mark.parametrize("rate", [None, 0.5])
def test_coefficients_have_a_group_of_their_own(tmp_path, rate):
    changes = {"coefficient_learning_rate": rate, "search_learning_rate": 0.02}
    watch, _ = searched(tmp_path, config_changes=changes, weight_decay=0.1, learning_rate=0.01)
    first = watch.groups[0]
    *others, own = first
    wanted = {id(one) for one in watch.coefficients}
    assert len(others) == 2
    assert {id(one) for one in own["params"]} == wanted
    assert own["weight_decay"] == 0
    assert [group["weight_decay"] for group in others] == [0.1, 0.0]
    rest = [id(one) for group in others for one in group["params"]]
    assert sorted(rest) == sorted(id(one) for one in watch.weights)
    assert not wanted & set(rest)
    rates = [[group["lr"] for group in groups] for groups in watch.groups]
    start = 0.02 if rate is None else rate  # 6 steps fall linearly to zero
    assert [one[-1] for one in rates] == pytest.approx([start * left / 6 for left in (5, 4, 3)])
    assert all(one[:2] == pytest.approx([0.02 * left / 6] * 2) for one, left in zip(rates, (5, 4, 3), strict=True))
    # The smaller model is trained with the user's rate, and has no such group.
    assert [group["initial_lr"] for group in watch.trained] == [0.01, 0.01]


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 1e-3},
        {"max_grad_norm": 0.0},
        {"optim": "sgd"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_optimizer_sees_the_task_gradient_and_the_penalty_once(tmp_path, options):
    watch, _ = searched(tmp_path, **options)
    assert len(watch.before) == len(watch.inside) == 3
    for before, inside, values in zip(watch.before, watch.inside, watch.values, strict=True):
        assert any(one.any() for one in before)  # the task's, already clipped
        for task, whole, value in zip(before, inside, values, strict=True):
            assert torch.equal(whole, task + 0.25 * value.sign())
    if options.get("max_grad_norm"):
        norm = torch.cat([one.flatten() for one in watch.before[0]]).norm()
        assert norm <= options["max_grad_norm"] * 1.001


def test_without_a_penalty_there_is_only_the_task(tmp_path):
    watch, _ = searched(tmp_path, config_changes={"l1": 0.0})
    assert all(map(torch.equal, watch.before[0], watch.inside[0]))


@pytest.mark.parametrize("batch", [4, 2, 1], ids=lambda batch: f"{4 // batch} micro-batches")
def test_the_penalty_alone_lets_all_fall_alike(tmp_path, batch):
    accumulation = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    options = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", **accumulation}
    watch, _ = searched(tmp_path, compute_loss=no_task, **options)
    for step, values in enumerate([*watch.values, [one.detach() for one in watch.coefficients]]):
        for one in values:
            assert torch.equal(one, torch.full_like(one, 1 - step * 0.5 * 0.25))


def test_a_negative_coefficient_rises():
    coefficients = UnitCoefficients.attach(whole_bert())
    for one in coefficients.parameters():
        nn.init.constant_(one, -2.0)
        one.grad = torch.zeros_like(one)
    coefficients.add_l1_gradient(0.25)
    assert all(one.grad.eq(-0.25).all() for one in coefficients.parameters())


def test_a_fused_optimizer_does_not_scale_the_penalty_away():
    """Under fp16, gradients that were not clipped are still scaled when the fused optimizer steps."""
    values = UnitCoefficients.attach(model := whole_bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    search = SimpleNamespace(stage=1, _coefficients=values, config=early_bird(l1=0.25, coefficient_learning_rate=0.5))
    EarlyBirdSearch.adjust_optimizer(search, optimizer)
    for one in model.parameters():
        one.grad = torch.zeros_like(one)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert all(one.eq(1 - 0.5 * 0.25).all() for one in values.parameters())


def test_coefficients_of_a_bf16_model_are_fp32(tmp_path):
    dtypes = []
    watch = AtStep(lambda model, **_: dtypes.append({name: one.dtype for name, one in model.named_parameters()}))
    trainer = bird_trainer(
        tmp_path, early_bird(draw_at=3, coefficient_learning_rate=1e-3), whole_bert().bfloat16(), callbacks=[watch]
    )
    trainer.train()
    assert len(dtypes) == 9
    for found in dtypes[:3]:
        own = {found.pop(name) for name in list(found) if "sparse_hf" in name}
        assert own == {torch.float32}
        assert set(found.values()) == {torch.bfloat16}
    coefficients = load_file(tmp_path / "coefficients.safetensors")
    assert {one.dtype for one in coefficients.values()} == {torch.float32}
    moved = torch.cat([coefficients[key] for key in KEYS])
    assert len(moved.unique()) > 10  # bf16 knows three numbers within 0.003 of 1
    assert (moved - 1).abs().max() < 4e-3
    assert {one.dtype for one in trainer.model.parameters()} == {torch.bfloat16}
