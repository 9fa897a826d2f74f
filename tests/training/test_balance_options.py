"""Each option of a `BalanceConfig` against a formula written row by row, and what the options refuse."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.test_router_logits import stock
from sparse_hf import BalanceConfig
from training.tiny_balance import mixtral, relative_error, routers_of, rows, step_gradients, trainer


def naive_losses(model, name):
    """Of each layer, with a graph, from the logits that the stock model returns."""
    batch = {one: torch.stack([row[one] for row in rows()]) for one in ("input_ids", "attention_mask")}
    found = []
    for logits in model(**batch, output_router_logits=True).router_logits:
        chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum(1).float()
        by_row = zip(logits.unflatten(0, (8, -1)), chosen.unflatten(0, (8, -1)), batch["attention_mask"], strict=True)
        kept = [(one[mask == 1], which[mask == 1]) for one, which, mask in by_row]
        everything = torch.cat([one for one, _ in kept]).softmax(-1), torch.cat([which for _, which in kept])
        if name == "sequence":
            loss = sum(switch(one.softmax(-1), which) for one, which in kept) / 8
        elif name == "device":
            loss = switch(*(one.unflatten(-1, (2, 2)).sum(-1) for one in everything))
        elif name == "entropy":
            loss = -(everything[0] * everything[0].log()).sum(-1).mean() / math.log(4)
        else:
            loss = torch.cat([one for one, _ in kept]).logsumexp(-1).square().mean()
        found.append(loss)
    return torch.stack(found)


def switch(probabilities, chosen):
    return len(chosen[0]) * (chosen.sum(0) / chosen.sum() * probabilities.mean(0)).sum()


LOGGED = {
    "sequence": "sequence_balance_loss",
    "device": "device_balance_loss",
    "entropy": "routing_entropy",
    "z": "router_z_loss",
}


@pytest.mark.parametrize("name", LOGGED)
def test_values_and_gradients(tmp_path, name):
    model = mixtral()
    expected = naive_losses(model, name)
    expected.sum().backward()
    changes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    groups = {"device_groups": 2} if name == "device" else {}
    gradients = {}
    for coefficient in (2.0, 0.0):
        options = {name: coefficient, **(groups if coefficient else {})}
        config = BalanceConfig(0.0, gradient="network", **options)
        gradients[coefficient] = step_gradients(tmp_path, config, mixtral(), **changes)
    own = {key: gradients[2.0][key] - one for key, one in gradients[0.0].items()}
    by_hand = {key: 2 * one.grad for key, one in model.named_parameters() if one.grad is not None}
    large = {key: one for key, one in by_hand.items() if one.norm() > 1e-3}
    assert len(large) > 10
    assert relative_error({key: own[key] for key in large}, large) < 2e-4
    training = trainer(tmp_path, BalanceConfig(0.0, **{name: 2.0}, **groups), mixtral(), logging_steps=1, **changes)
    training.args.logging_strategy = "steps"
    training.train()
    logged = training.state.log_history[0]
    assert logged[LOGGED[name]] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert logged[f"{LOGGED[name]}_worst_layer"] == pytest.approx(expected.max().item(), rel=1e-5)
    assert set(LOGGED.values()) & set(logged) == {LOGGED[name]}


def test_packed_rows_are_told_by_positions(tmp_path):
    """The same sequences, two and two in a row without padding, have the same loss."""
    ids = torch.randint(3, 60, (8, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for packed in (1, 2):
        positions = torch.arange(5).repeat(packed)
        data = [{"input_ids": one, "labels": one, "position_ids": positions} for one in ids.view(-1, 5 * packed)]
        size = dict(per_device_train_batch_size=len(data), logging_strategy="steps", logging_steps=1)
        training = trainer(tmp_path, BalanceConfig(0.0, sequence=1.0), mixtral(), **size)
        training.train_dataset = data
        training.train()
        found.append(training.state.log_history[0]["sequence_balance_loss"])
    assert found[0] > 1.05
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    training.args.remove_unused_columns = False
    training.train_dataset = [{"seq_idx": one.pop("position_ids"), **one} for one in data]
    with pytest.raises(ValueError, match="got `seq_idx` without"):
        training.train()


@pytest.mark.parametrize("gradient", ["routers", "network"])
def test_float32_routers(tmp_path, gradient):
    """Under autocast, the losses' gradient is that of a float32 router on the same bfloat16 states, nearly."""

    def balance(**changes):
        with_it, without = (
            step_gradients(tmp_path, BalanceConfig(c, gradient=gradient, **changes), mixtral(), bf16=True)
            for c in (1.0, 0.0)
        )
        return routers_of({name: with_it[name] - without[name] for name in with_it})

    training = trainer(tmp_path, BalanceConfig(gradient=gradient, float32_routers=True), mixtral(), bf16=True)
    seen, gate = [], training.model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, __, output: seen.append(output[0].dtype))
    training.train()
    gate(torch.ones(2, 16, dtype=torch.float32))
    assert seen[0] == torch.float32
    assert len(gate._forward_pre_hooks) == 0  # nothing stays behind
    assert relative_error(balance(float32_routers=True), balance()) < 0.1
    training = trainer(tmp_path, BalanceConfig(gradient=gradient), mixtral(), bf16=True)
    seen, gate = [], training.model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, __, output: seen.append(output[0].dtype))
    training.train()
    assert seen[0] == torch.bfloat16


def test_devices_divide_the_experts(tmp_path):
    with pytest.raises(ValueError, match="`device_groups` must divide the experts, got 3 for 4"):
        trainer(tmp_path, BalanceConfig(device=0.1, device_groups=3))


def test_quantised_routers_are_refused_and_experts_are_not(tmp_path):
    model = stock("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.up = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    trainer(tmp_path, BalanceConfig(), model)
    gate = model.model.layers[1].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"`weight` in the router of `model\.layers\.1\.mlp` is torch\.int8"):
        trainer(tmp_path, BalanceConfig(), model)


class Operations(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "unique", "masked_select"}


def operations(tmp_path, layers, balance):
    """What the balancer itself runs in one step but the first, in front of the backward pass."""
    training = trainer(tmp_path, balance, mixtral(num_hidden_layers=layers), max_steps=2)
    balancer, steps = training._load_balancer, []

    def counted(function):
        def run(*arguments):
            with Operations() as mode:
                result = function(*arguments)
            steps[-1].append(mode.found)
            return result

        return run

    begin = balancer.begin_step
    balancer.begin_step = lambda batches: steps.append([]) or begin(batches)
    balancer._read, balancer._term = counted(balancer._read), counted(balancer._term)
    training.train()
    assert [len(one) for one in steps] == [2, 2]
    assert any(WAITS & set(one) for one in steps[0]) == (balance.has_losses and balance.gradient == "routers")
    return steps[1]


@pytest.mark.parametrize(
    ("balance", "per_layer"),
    [
        (BalanceConfig(0.0), 2),
        (BalanceConfig(sequence=0.1, gradient="network"), 2),
        (BalanceConfig(z=0.1, sequence=0.1, device=0.1, device_groups=2, entropy=0.1), 12),
    ],
)
def test_the_device_is_not_waited_for_and_layers_run_together(tmp_path, balance, per_layer):
    few, many = operations(tmp_path, 2, balance), operations(tmp_path, 4, balance)
    for step in (*few, *many):
        assert not WAITS & set(step)
    more = sum(sum(one.values()) for one in many) - sum(sum(one.values()) for one in few)
    assert more <= 2 * per_layer
