"""Expert dropout: what is left out is not chosen, in any family, and nothing else changes."""

import pytest
import torch
from transformers import TrainerState

from moe.every_family import STOCK_FAMILIES, every_family
from sparse_hf import ExpertDropoutCallback, TopKSchedule, TopKScheduleCallback
from sparse_hf.moe.router_logits import RouterReader
from training.tiny_balance import mixtral, trainer
from training.tiny_training import AtBegin, AtStep


IDS = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(0))


def begun(model, probability=0.5, step=0):
    callback = ExpertDropoutCallback(probability)
    state = TrainerState(global_step=step, max_steps=9)
    callback.on_train_begin(None, state, None, model=model)
    callback.on_step_begin(None, state, None)
    return callback


def ended(callback):
    callback.on_train_end(None, None, None)


def chosen(model):
    """Which experts each layer chose for any token, bool (layers, experts)."""
    reader = RouterReader(model)
    with reader.listening() as routings, torch.no_grad():
        model(IDS)
    reader.detach()
    return torch.stack([torch.bincount(one.chosen.flatten(), minlength=4) > 0 for one in routings])


@pytest.mark.parametrize("model_type", [one for one in STOCK_FAMILIES if one != "phimoe"])
def test_every_family(model_type):
    model = every_family(model_type)
    with torch.no_grad():
        plain = model(IDS).logits
    callback = begun(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)  # evaluation is untouched
    model.train()
    left_out = 0
    for step in range(4):
        callback.on_step_begin(None, TrainerState(global_step=step), None)
        kept = callback.kept()
        assert not (chosen(model) & ~kept).any()
        left_out += int((~kept).sum())
    assert left_out > 4
    ended(callback)
    assert chosen(model).sum() > 6  # again all that the routers want
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_left_out_depends_on_seed_and_step_alone():
    first, second = (begun(mixtral(), step=step).kept() for step in (3, 3))
    assert torch.equal(first, second)
    draws = [begun(mixtral(), step=step).kept() for step in range(6)]
    assert len({tuple(one.flatten().tolist()) for one in draws}) > 2
    assert all(one.sum(1).min() >= 2 for one in draws)


def test_zero_drops_nothing():
    model = mixtral().train()
    with torch.no_grad():
        plain = model(IDS).logits
        callback = begun(model, 0.0)
        assert torch.equal(model(IDS).logits, plain)
    assert callback.kept().all()


def test_recomputation_leaves_out_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = mixtral().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        begun(model, step=2)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    for name, one in gradients[0].items():
        assert torch.allclose(one, gradients[1][name], atol=1e-6), name


def test_with_a_schedule_of_k_in_a_trainer(tmp_path):
    """In the order in which a user may pass them; each step keeps enough experts for its k."""
    dropout, kept, forwards = ExpertDropoutCallback(0.9, seed=1), [], []
    callbacks = [
        dropout,
        TopKScheduleCallback(TopKSchedule(1, 3)),
        AtBegin(lambda model, **_: forwards.append("forward" in vars(model.model.layers[0].mlp))),
        AtStep(lambda step, **_: kept.append(dropout.kept().sum(1).tolist())),
    ]
    training = trainer(
        tmp_path,
        callbacks=callbacks,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    training.train()
    assert forwards == [True]
    assert all(min(layers) >= k for layers, k in zip(kept, [1, 2, 2, 3], strict=True))
    assert min(kept[0]) == 1
    assert "forward" not in vars(training.model.model.layers[0].mlp)


def test_another_forward_comes_back():
    model = mixtral()
    block = model.model.layers[0].mlp
    block.forward = other = block.forward
    ended(begun(model))
    assert vars(block)["forward"] is other


def test_refusals():
    for wrong in (-0.1, 1, float("nan"), "0.1", True):
        with pytest.raises(ValueError, match=r"`probability` must be in \[0, 1\)"):
            ExpertDropoutCallback(wrong)
    with pytest.raises(ValueError, match="must know how routers choose, which it does not of phimoe"):
        begun(every_family("phimoe"))
    with pytest.raises(ValueError, match="at most 2 of 4 experts"):
        begun(every_family("glm4_moe", n_group=2, topk_group=1))
    model = mixtral().train()
    begun(model)
    model.model.layers[1].mlp.gate.forward = lambda hidden: (None, torch.ones(32, 2), torch.zeros(32, 2).long())
    with pytest.raises(ValueError, match="must find the one choice .* found 0 in MixtralSparseMoeBlock"):
        model(IDS)
