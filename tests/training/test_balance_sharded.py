"""The balance loss means the same where ranks hold parts of the weights: FSDP2, ZeRO-2 and ZeRO-3."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from moe.test_selection_bias import biased
from sparse_hf import BalanceConfig
from training.balance_processes import (
    CASES,
    KINDS,
    added,
    all_losses,
    bias_trainer,
    gradients,
    mixtral,
    moved_biases,
)
from training.tiny_balance import relative_error, routers_of, trainer
from training.tiny_training import assert_same
from training.two_processes import found_by_both, run_two


pytestmark = pytest.mark.slow
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module", params=CASES)
def sharded(request, tmp_path_factory):
    """The strategy, and what both processes came to under it, by case and kind."""
    if request.param != "fsdp2" and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    mixtral().save_pretrained(folder / "base")
    run_two("training.balance_processes", "run_one_process", folder, STRATEGY=request.param, DS_ACCELERATOR="cpu")
    return request.param, found_by_both(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All rows at once in one process, by kind."""
    return added(tmp_path_factory.mktemp("alone"), "alone")


def test_gradients_are_those_of_one_process(sharded, alone):
    for kind in KINDS:
        found, expected = sharded[1]["added"][kind], dict(alone[kind])
        assert torch.allclose(found.pop("logged"), expected.pop("logged"), rtol=1e-5), kind
        assert relative_error(routers_of(found), routers_of(expected)) < 1e-5, kind
        large = {name: one for name, one in expected.items() if one.norm() > 1e-3}
        assert len(large) == 2 if kind == "routers" else len(large) > 10
        assert relative_error({name: found[name] for name in large}, large) < 1e-4, kind


def test_models_that_are_split_when_they_are_loaded(sharded, tmp_path):
    if sharded[0] != "zero-3":
        pytest.skip("only ZeRO-3 does this")
    expected = gradients(tmp_path, "alone", all_losses("routers"))
    found = sharded[1]["loaded"]["routers"]
    assert relative_error(routers_of(found), routers_of(expected)) < 1e-5


def test_biases_are_those_of_one_process_and_are_resumed(sharded, tmp_path):
    found = sharded[1]["bias"]
    expected = moved_biases(bias_trainer(tmp_path, "alone"))
    biases = {name: one for name, one in expected.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert any(one.any() for one in biases.values())
    assert_same({name: found["whole"][name] for name in biases}, biases)
    for name, one in expected.items():  # a loss was trained with too, in a family that ZeRO-3 takes apart by modules
        assert torch.allclose(found["whole"][name], one, rtol=0, atol=2e-5), name
    assert_same(found["resumed"], found["whole"])


@pytest.mark.parametrize(
    ("surroundings", "named"),
    [
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "FSDP's first version"),
        (
            {
                "distributed_type": DistributedType.DEEPSPEED,
                "state": SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=0)),
            },
            "DeepSpeed without ZeRO",
        ),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "DistributedType.MEGATRON_LM"),
    ],
)
def test_other_ways_to_split_a_model_are_refused(tmp_path, surroundings, named):
    balancer = trainer(tmp_path, BalanceConfig())._load_balancer
    args = SimpleNamespace(n_gpu=0, torch_compile=False)
    balancer.trainer = SimpleNamespace(args=args, accelerator=SimpleNamespace(**surroundings))
    with pytest.raises(ValueError, match=f"alone or under DDP, FSDP2 and ZeRO, got {named}"):
        balancer._check_surroundings()


def test_a_bias_that_is_split_is_refused(tmp_path):
    model = biased("ernie4_5_moe")
    training = trainer(tmp_path, BalanceConfig(0.0, bias_rate=0.001), model)
    model.model.layers[0].mlp.gate.moe_statics.e_score_correction_bias.ds_id = 0  # as ZeRO-3 marks its own
    with pytest.raises(ValueError, match="which FSDP and DeepSpeed split"):
        training.train()
