"""`SparseTrainer(balance=...)`: what it trains, what it measures, and what it refuses."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparse_hf import BalanceConfig
from sparse_hf.algorithms.balance import chosen_fractions, switch_loss
from sparse_hf.algorithms.expert_load import expert_load, variation_by_chance
from tiny_models import tiny_model
from training.tiny_balance import (
    LENGTH,
    balance_gradients,
    mixtral,
    relative_error,
    routers_of,
    rows,
    step_gradients,
    trainer,
)
from training.tiny_training import assert_same, tensors


TOKENS = 68  # of the eight rows, without padding
GRADIENTS = pytest.mark.parametrize("gradient", ["routers", "network"])


def expected_routing(model):
    """Counts and mean probabilities of all rows, from the logits that stock models return, padding left out."""
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    kept = torch.stack(logits)[:, batch["attention_mask"].reshape(-1).bool()]
    counts = torch.nn.functional.one_hot(kept.topk(2).indices, 4).sum((1, 2))
    return counts, kept.softmax(-1).mean(1)


@GRADIENTS
@pytest.mark.parametrize("accumulation", [1, 4])
def test_log(tmp_path, gradient, accumulation):
    model = mixtral()
    counts, probabilities = expected_routing(model)
    training = trainer(
        tmp_path,
        BalanceConfig(0.5, gradient=gradient),
        model,
        logging_strategy="steps",
        logging_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    training.train()
    stock = trainer(tmp_path, None, mixtral(), logging_strategy="steps", logging_steps=1)
    stock.train()
    logged, plain = training.state.log_history[0], stock.state.log_history[0]
    assert int(counts[0].sum()) == 2 * TOKENS
    assert logged["loss"] == pytest.approx(plain["loss"], rel=1e-3)  # the task's alone
    losses = switch_loss(chosen_fractions(counts), probabilities)
    assert logged["balance_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert logged["balance_loss_worst_layer"] == pytest.approx(losses.max().item(), rel=1e-5)
    load = expert_load(counts)
    assert logged["load_max_violation_worst_layer"] == pytest.approx(load.max_violation.max().item())
    assert logged["load_variation"] == pytest.approx(load.variation.mean().item())
    assert logged["load_entropy_worst_layer"] == pytest.approx(load.entropy.min().item())
    assert logged["load_min_share"] == pytest.approx(load.min_share.mean().item())
    assert logged["load_variation_by_chance"] == pytest.approx(variation_by_chance(4, 2, TOKENS))
    assert logged["dead_experts"] == load.dead.sum().item()
    assert "balance_loss" not in training.state.log_history[-1]  # the record of the whole training


def test_zero_only_measures(tmp_path):
    """Bit-equal weights, and losses beside them."""
    stock, measured = (trainer(tmp_path, one, max_steps=3, logging_steps=1) for one in (None, BalanceConfig(0)))
    stock.args.logging_strategy = measured.args.logging_strategy = "steps"
    stock.train()
    measured.train()
    assert_same(tensors(stock.model), tensors(measured.model))


def skewed():
    """What all tokens have in common sends them to the first two experts of each layer; only routers are trained."""
    model = mixtral()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gate." in name)
    with torch.no_grad():
        model.model.embed_tokens.weight += 3
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.1 * torch.tensor([[1.0], [1], [-1], [-1]])
    return model


@GRADIENTS
def test_load_becomes_even(tmp_path, gradient):
    options = dict(max_steps=40, learning_rate=0.02, optim="adamw_torch", logging_strategy="steps", logging_steps=1)
    variations = []
    for coefficient in (1.0, 0.0):
        training = trainer(tmp_path, BalanceConfig(coefficient, gradient=gradient), skewed(), **options)
        training.train()
        logged = [one["load_variation"] for one in training.state.log_history[:-1]]
        assert logged[0] > 0.8  # two of four experts alone: 1
        variations.append(sum(logged[30:]) / 10)
    balanced, left = variations
    assert balanced < 0.75 * left


@GRADIENTS
def test_evaluation_stays_pure(tmp_path, gradient):
    model = mixtral(output_router_logits=True)
    training = trainer(tmp_path, BalanceConfig(5.0, gradient=gradient), model, eval_dataset=rows())
    first = training.evaluate()["eval_loss"]
    assert first == pytest.approx(trainer(tmp_path, None, mixtral(), eval_dataset=rows()).evaluate()["eval_loss"])
    training.train()
    assert not training.model.model.layers[0].mlp.experts._forward_pre_hooks  # nothing stays behind
    training.evaluate()


@GRADIENTS
def test_gradient_checkpointing_changes_nothing(tmp_path, gradient):
    plain = balance_gradients(tmp_path, gradient, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    changes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing=True)
    recomputed = balance_gradients(tmp_path, gradient, **changes)
    large = {name: one for name, one in plain.items() if one.norm() > 1e-3}
    assert relative_error({name: recomputed[name] for name in large}, large) < 1e-3


def test_reentrant_checkpointing(tmp_path):
    """Its logits have no graph: an error where one is needed, right where none is."""
    changes = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="must run with `use_reentrant=False`"):
        trainer(tmp_path, BalanceConfig(gradient="network"), **changes).train()
    found, expected = (balance_gradients(tmp_path, "routers", **one) for one in (changes, {}))
    assert relative_error(routers_of(found), routers_of(expected)) < 1e-4


def test_bfloat16(tmp_path):
    whole = balance_gradients(tmp_path, "routers", bf16=True)
    split = balance_gradients(
        tmp_path, "routers", bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert relative_error(routers_of(split), routers_of(whole)) < 0.02


def test_dropout_draws_what_the_counting_pass_drew(tmp_path):
    seen = []
    training = trainer(
        tmp_path,
        BalanceConfig(gradient="network"),
        mixtral(attention_dropout=0.5),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    balancer = training._load_balancer
    over_ranks = balancer._over_ranks
    balancer._over_ranks = lambda tensor: seen.append(tensor) or over_ranks(tensor)
    training.train()
    assert torch.equal(seen[0], balancer._step.own)
    without, _ = expected_routing(mixtral())
    assert not torch.equal(seen[0][:-1], without.flatten())  # dropout did something


def test_routers_in_an_adapter(tmp_path):
    def adapted(**changes):
        return get_peft_model(mixtral(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **changes))

    with pytest.raises(ValueError, match="all are frozen"):
        trainer(tmp_path, BalanceConfig(), adapted())
    gradients = step_gradients(tmp_path, BalanceConfig(1.0), adapted(modules_to_save=["gate"]))
    plain = step_gradients(tmp_path, BalanceConfig(1.0), mixtral())
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.gate"
        found = gradients[f"base_model.model.{name}.modules_to_save.default.weight"]
        assert torch.allclose(found, plain[f"{name}.weight"], rtol=1e-4, atol=1e-6)
    lora = adapted(target_parameters=["gate.weight"])
    with pytest.raises(ValueError, match="nothing but a bias beside it"):
        trainer(tmp_path, BalanceConfig(), lora)
    gradients = step_gradients(tmp_path, BalanceConfig(100.0, gradient="network"), lora)
    assert any("gate" in name and one.abs().sum() > 0 for name, one in gradients.items())


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="model of type 'llama': it is dense"):
        trainer(tmp_path, BalanceConfig(), tiny_model("llama", "causal_lm"))
    with pytest.raises(TypeError, match="`balance` must be a BalanceConfig, got float"):
        trainer(tmp_path, 0.01)
    with pytest.raises(ValueError, match="`router_aux_loss_coef`=0.05"):
        trainer(tmp_path, BalanceConfig(), mixtral(output_router_logits=True, router_aux_loss_coef=0.05))
    with pytest.raises(ValueError, match="FSDP2 and ZeRO, got `torch_compile`"):
        trainer(tmp_path, BalanceConfig(), torch_compile=True)
    with pytest.raises(ValueError, match="model of type 'llama'"):
        trainer(tmp_path, BalanceConfig(), model_init=lambda: tiny_model("llama", "causal_lm")).train()


def test_masks_of_other_shapes_are_refused(tmp_path):
    training = trainer(tmp_path, BalanceConfig())
    training.train_dataset = [{**row, "attention_mask": torch.zeros(1, LENGTH, LENGTH)} for row in rows()]
    with pytest.raises(ValueError, match=r"`attention_mask` must tell padding of the 80 tokens"):
        training.train()


def test_z_loss_needs_a_softmax(tmp_path):
    from moe.test_router_logits import stock

    model = stock("deepseek_v3")
    with pytest.raises(ValueError, match="got `z`=0.001 for deepseek_v3, which chooses by sigmoids"):
        trainer(tmp_path, BalanceConfig(z=0.001), model)
    gradients = step_gradients(tmp_path, BalanceConfig(1.0), model)
    assert all(one.norm() > 0 for one in routers_of(gradients).values())


@GRADIENTS
def test_a_step_of_padding_alone_adds_nothing(tmp_path, gradient):
    """Not NaN, which the weights would keep."""
    training = trainer(tmp_path, BalanceConfig(gradient=gradient), max_steps=1)
    training.train_dataset = [{**row, "attention_mask": torch.zeros(LENGTH, dtype=torch.long)} for row in rows()]
    training.train()
    assert all(torch.isfinite(one).all() for name, one in tensors(training.model).items() if ".gate." in name)


def test_a_training_loop_that_does_not_tell_its_steps_is_refused(tmp_path):
    training = trainer(tmp_path, BalanceConfig(), gradient_accumulation_steps=2, per_device_train_batch_size=4)
    balancer = training._load_balancer
    balancer.begin_step = lambda batches: type(balancer).begin_step(balancer, batches[:1])
    with pytest.raises(ValueError, match="this is number 2 of 1"):
        training.train()
