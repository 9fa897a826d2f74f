"""`BalanceConfig(bias_rate=...)`: one move of the bias per optimizer step, from the counts of the whole step."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.test_selection_bias import biased, biases_of
from sparse_hf import BalanceConfig
from training.tiny_balance import rows, trainer
from training.tiny_training import assert_same, tensors


RATE = 0.25  # a power of two, so that sums are exact
ALONE = BalanceConfig(0.0, bias_rate=RATE)


def counts_of(model):
    """Choices of all rows, padding left out, from the routers' own output."""
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "attention_mask")}
    found = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, passed: found.append(passed[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    kept = batch["attention_mask"].flatten().bool()
    return torch.stack([torch.nn.functional.one_hot(one[kept], 4).sum((0, 1)) for one in found])


@pytest.mark.parametrize("split", [(8, 1), (2, 4), (3, 3)])
@pytest.mark.parametrize("balance", [ALONE, BalanceConfig(0.1, bias_rate=RATE, gradient="network")])
def test_a_step(tmp_path, split, balance):
    model = biased("glm4_moe")
    counts = counts_of(model)
    assert len(counts.unique()) > 2
    batch, accumulation = split
    changes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer(tmp_path, balance, model, **changes).train()
    expected = RATE * (counts.double().mean(1, keepdim=True) - counts).sign()
    assert torch.equal(torch.stack(biases_of(model)).double(), expected)


def test_every_pass_of_a_step_sees_one_bias_and_evaluation_the_latest(tmp_path):
    seen = []
    model = biased("glm4_moe")
    training = trainer(
        tmp_path,
        ALONE,
        model,
        eval_dataset=rows(),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=1,
    )
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda *_: seen.append(gate.e_score_correction_bias.clone()))
    training.train()
    first, again, after, *second = seen
    assert not first.any()
    assert torch.equal(first, again)
    assert after.any()  # evaluation
    assert torch.equal(after, second[0])
    assert torch.equal(after, second[1])
    assert (second[2] - after).abs().max() == RATE  # evaluation again


def test_a_step_that_the_scaler_skipped_leaves_it(tmp_path, monkeypatch):
    model = biased("glm4_moe")
    training = trainer(tmp_path, ALONE, model, max_steps=2)
    skipped = iter([True, True, False, False])
    monkeypatch.setattr(type(training.accelerator), "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    training.train()
    assert torch.stack(biases_of(model)).abs().max() == RATE  # and not twice as much


def test_load_becomes_even(tmp_path):
    """From biases that send all tokens to two of four experts."""

    def skewed():
        model = biased("glm4_moe", initializer_range=0.3)
        for bias in biases_of(model):
            bias += torch.tensor([0.5, 0.5, -0.5, -0.5])
        return model

    options = dict(max_steps=24, learning_rate=1e-4, logging_strategy="steps", logging_steps=1)
    variations = []
    for rate in (0.05, 0.0):
        training = trainer(tmp_path, BalanceConfig(0.0, bias_rate=rate), skewed(), **options)
        training.train()
        logged = [one["load_variation"] for one in training.state.log_history[:-1]]
        variations.append(sum(logged[16:]) / 8)
    balanced, left = variations
    assert left > 0.9
    assert balanced < 0.4


def test_the_bias_alone_leaves_gradients_alone(tmp_path):
    """The first step's weights are those without it, bit for bit: it moves afterwards."""
    models = [biased("glm4_moe"), biased("glm4_moe")]
    for model, balance in zip(models, (ALONE, None), strict=True):
        trainer(tmp_path, balance, model).train()
    found, expected = ({n: t for n, t in tensors(one).items() if "e_score" not in n} for one in models)
    assert_same(found, expected)


def test_resumed_where_it_was(tmp_path):
    """From the bias and the weights of a checkpoint of the second step, the third makes what it made at once."""
    training = trainer(tmp_path, ALONE, biased("lfm2_moe"), max_steps=3, save_strategy="steps", save_steps=1)
    training.train()
    whole = biases_of(training.model)
    resumed = trainer(tmp_path, ALONE, biased("lfm2_moe"), max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, other) for one, other in zip(whole, biases_of(resumed.model), strict=True))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert any(not torch.equal(one, other) for one, other in zip(whole, biases_of(saved), strict=True))


def test_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="`bias_rate` needs routers with a bias for the choice alone"):
        trainer(tmp_path, ALONE)
