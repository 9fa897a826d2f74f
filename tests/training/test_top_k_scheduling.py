"""SMoE-Dropout in a stock Trainer: k grows, routers stay, each checkpoint says its k; and the self-slimmable curve."""

import json

import pytest
import torch
from transformers import TrainerState

from sparse_hf import (
    BalanceConfig,
    SparseTrainer,
    TopKSchedule,
    TopKScheduleCallback,
    evaluate_top_k,
    get_top_k,
    set_top_k,
)
from training.tiny_balance import mixtral, rows, trainer
from training.tiny_training import AtBegin, AtStep, assert_same, tensors, tiny_arguments


ADAMW = dict(optim="adamw_torch", weight_decay=0.1, learning_rate=1e-2)
KS = [1, 2, 2, 3, 3, 4, 4]  # k(s) = round(1 + 3 s / 6), halves up


def routers(model):
    return {name: one for name, one in model.named_parameters() if ".gate." in name}


def test_a_training(tmp_path):
    found, frozen = [], []
    callbacks = [
        TopKScheduleCallback(TopKSchedule()),
        AtBegin(lambda model, **_: found.append(get_top_k(model))),
        AtStep(lambda step, model, **_: found.append(get_top_k(model))),
        AtStep(lambda step, model, **_: frozen.append(not any(one.requires_grad for one in routers(model).values()))),
    ]
    model = mixtral()
    before = tensors(model)
    training = trainer(
        tmp_path, None, model, callbacks=callbacks, max_steps=6, save_strategy="steps", save_steps=3, **ADAMW
    )
    training.train()
    assert found == KS
    assert frozen == [True] * 6
    # No gradient, no weight decay, no moments; everything else is trained.
    changed = {name for name, one in tensors(model).items() if not torch.equal(one, before[name])}
    assert changed == before.keys() - routers(model).keys()
    assert not any(one in training.optimizer.optimizer.state for one in routers(model).values())
    assert all(one.requires_grad for one in routers(model).values())  # as before the training
    for step, k in ((3, 3), (6, 4)):
        config = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())
        assert config["num_experts_per_tok"] == k
    assert model.config.num_experts_per_tok == 4


def begun_at(step, schedule, model, **state):
    """A callback whose training begins at a step of six."""
    callback = TopKScheduleCallback(schedule)
    args = trainer("unused", None, model).args
    callback.on_train_begin(args, TrainerState(global_step=step, max_steps=6), None, model=model)
    return callback, args


@pytest.mark.parametrize("step", range(7))
def test_a_resumed_training_has_the_k_of_its_step(step):
    model = mixtral()
    begun_at(step, TopKSchedule(freeze_routers=False), model)
    assert get_top_k(model) == KS[step]
    assert all(one.requires_grad for one in routers(model).values())


def test_until_and_shape():
    model = mixtral()
    callback, args = begun_at(0, TopKSchedule(2, 4, "exponential", until=0.5), model)
    found = []
    for step in range(1, 5):
        callback.on_step_end(args, TrainerState(global_step=step, max_steps=6), None, model=model)
        found.append(get_top_k(model))
    assert found == [3, 3, 4, 4]  # 2 * 2^(1/3) = 2.52, 2 * 2^(2/3) = 3.17


def test_the_best_model_gets_its_k():
    model = mixtral()
    callback, args = begun_at(0, TopKSchedule(), model)
    args.load_best_model_at_end = True
    state = TrainerState(global_step=6, max_steps=6, best_model_checkpoint="checkpoint-3", best_global_step=3)
    callback.on_train_end(args, state, None, model=model)
    assert get_top_k(model) == 3


@pytest.mark.parametrize("schedule", [TopKSchedule(5, 4), TopKSchedule(1, 5)])
def test_what_the_model_cannot_have_is_refused_at_once(schedule):
    model = mixtral()
    with pytest.raises(ValueError, match="must be 1 to 4, got 5"):
        begun_at(0, schedule, model)
    assert get_top_k(model) == 2
    assert all(one.requires_grad for one in routers(model).values())


def test_the_curve(tmp_path):
    """Each k's loss is that of a model which was made with it; afterwards nothing has changed."""
    model = mixtral()
    before = tensors(model)
    training = trainer(tmp_path, None, model, eval_dataset=rows())
    curve = evaluate_top_k(training)
    assert list(curve) == [1, 2, 3, 4]
    for k, metrics in curve.items():
        alone = trainer(tmp_path, None, mixtral(num_experts_per_tok=k), eval_dataset=rows())
        assert metrics["loss"] == alone.evaluate()["eval_loss"]
    assert len({metrics["loss"] for metrics in curve.values()}) == 4
    assert training.state.log_history[0]["top_1_loss"] == curve[1]["loss"]
    assert get_top_k(model) == 2
    assert_same(before, tensors(model))


def test_the_curve_comes_back_after_errors(tmp_path, monkeypatch):
    model = mixtral()
    training = trainer(tmp_path, None, model, eval_dataset=rows())
    calls = []
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: calls.append(get_top_k(model)) or 1 / 0)
    with pytest.raises(ValueError, match="must be 1 to 4, got 9"):
        evaluate_top_k(training, [3, 9])
    assert calls == []
    with pytest.raises(ZeroDivisionError):
        evaluate_top_k(training, [3])
    assert calls == [3]
    assert get_top_k(model) == 2
    set_top_k(model, 4)
    assert get_top_k(model) == 4


@pytest.mark.parametrize("balance", [None, BalanceConfig()])
def test_a_sparse_trainer_logs_k(tmp_path, balance):
    schedule = TopKScheduleCallback(TopKSchedule(freeze_routers=False))
    arguments = tiny_arguments(tmp_path, max_steps=3, logging_strategy="steps", logging_steps=1)
    training = SparseTrainer(mixtral(), arguments, train_dataset=rows(), balance=balance, callbacks=[schedule])
    training.train()
    assert [entry["experts_per_token"] for entry in training.state.log_history if "loss" in entry] == [1, 2, 3]
