"""The balance loss means the same however a step's rows are split into micro-batches and processes.

Beside it what Transformers' own loss does: it grows with accumulation and with processes.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.test_selection_bias import biased, biases_of
from sparse_hf import BalanceConfig
from training.tiny_balance import balance_gradients, relative_error, routers_of, trainer
from training.two_processes import run_two


KINDS = ("routers", "network", "stock")
# (rows per process and micro-batch, accumulation) by two processes
TWO = ((4, 1), (2, 2))
GLOO = {"ddp_backend": "gloo"}


def gradients_of(folder, kind, batch, accumulation, **changes):
    changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return balance_gradients(folder, None if kind == "stock" else kind, **changes)


def moved_biases(folder, batch, accumulation, **changes):
    """The biases of the choice after one step."""
    model = biased("glm4_moe")
    changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer(folder, BalanceConfig(0.0, bias_rate=0.25), model, **changes).train()
    return biases_of(model)


def run_one_process(folder: str) -> None:
    """What each of the two processes does: train a step in every way, and write down its gradients."""
    found = {}
    for kind in KINDS:
        for batch, accumulation in TWO:
            gradients = gradients_of(Path(folder) / "run", kind, batch, accumulation, **GLOO)
            assert torch.distributed.get_world_size() == 2
            found |= {f"{kind}.{batch}.{accumulation}/{name}": one for name, one in gradients.items()}
    found |= {f"bias/{layer}": one for layer, one in enumerate(moved_biases(Path(folder) / "run", 2, 2, **GLOO))}
    save_file(found, Path(folder) / f"rank-{os.environ['RANK']}.safetensors")


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """By kind, batch and accumulation: gradients in the first process; the second's are equal, which DDP sees to."""
    folder = tmp_path_factory.mktemp("two")
    run_two("training.test_load_balancer_splits", "run_one_process", folder)
    first, second = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    found: dict = {}
    for name, gradient in first.items():
        split, _, parameter = name.partition("/")
        found.setdefault(split, {})[parameter] = gradient
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All rows at once in one process, by kind."""
    return {kind: gradients_of(tmp_path_factory.mktemp(kind), kind, 8, 1) for kind in KINDS}


@pytest.mark.parametrize("kind", ["routers", "network"])
def test_two_processes(of_two_processes, whole, kind):
    for batch, accumulation in TWO:
        found = of_two_processes[f"{kind}.{batch}.{accumulation}"]
        assert relative_error(routers_of(found), routers_of(whole[kind])) < 1e-5
        if kind == "network":  # and everything below them
            expected = {name: one for name, one in whole[kind].items() if one.norm() > 1e-3}
            assert len(expected) > 10
            assert relative_error({name: found[name] for name in expected}, expected) < 1e-4


def test_biases_of_two_processes(tmp_path, of_two_processes):
    """Equal in both, and moved by the load of all rows."""
    for layer, expected in enumerate(moved_biases(tmp_path, 8, 1)):
        assert expected.any()
        assert torch.equal(of_two_processes["bias"][str(layer)], expected)


@pytest.mark.parametrize("kind", ["routers", "network"])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (1, 8), (3, 3)])
def test_accumulation(tmp_path, whole, kind, batch, accumulation):
    """(3, 3) makes micro-batches of 3, 3 and 2 rows."""
    found = gradients_of(tmp_path, kind, batch, accumulation)
    assert relative_error(routers_of(found), routers_of(whole[kind])) < 1e-5


def test_routers_alone_leave_the_rest_alone(whole):
    for name, gradient in whole["routers"].items():
        assert (gradient.norm() > 1e-3) == (".gate." in name), name
    # The last layer's router feels the same from either: nothing of its loss passes another layer's.
    last = "model.layers.1.mlp.gate.weight"
    assert relative_error({last: whole["routers"][last]}, {last: whole["network"][last]}) < 1e-4


def test_the_stock_loss_grows_with_accumulation_and_processes(tmp_path, whole, of_two_processes):
    expected = routers_of(whole["stock"])
    sizes = {}
    for split, found in {
        "accumulation": gradients_of(tmp_path, "stock", 2, 4),
        "processes": of_two_processes["stock.4.1"],
        "both": of_two_processes["stock.2.2"],
    }.items():
        assert relative_error(routers_of(found), expected) > 0.5
        sizes[split] = sum(one.norm() for one in routers_of(found).values()) / sum(
            one.norm() for one in expected.values()
        )
    assert 3 < sizes["accumulation"] < 6  # 4 micro-batches, each with the noise of its own f
    assert 1.6 < sizes["processes"] < 3
    assert 3 < sizes["both"] < 6
