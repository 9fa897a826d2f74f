"""What each of two processes trains with a balance loss under FSDP2 or ZeRO, for `test_balance_sharded.py`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe.test_selection_bias import biased
from sparse_hf import BalanceConfig
from sparse_hf.algorithms.zero_partitions import is_partitioned
from training.test_fsdp2 import FSDP, pretend_to_be_on_gpus
from training.tiny_balance import all_losses, mixtral, trainer
from training.tiny_training import Crash, CrashAt, tiny_arguments
from training.two_processes import leave_found, without_compiling
from training.zero_processes import whole, zero_config


RATE = 64.0  # of SGD, so that a step's gradient is not lost in the weights' rounding
KINDS = ("routers", "network")
WITHOUT = BalanceConfig(0.0)
BIAS = BalanceConfig(1.0, bias_rate=0.25)
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
# By strategy, how the rows of a step are split there.
CASES = {
    "fsdp2": {**SPLIT, "gradient_checkpointing": True},
    "zero-2": {"per_device_train_batch_size": 4},
    "zero-3": SPLIT,
}


def sharding(strategy: str, layer: str = "MixtralDecoderLayer", persistent: int = 0) -> dict[str, object]:
    """The Trainer's arguments for "alone", "ddp", "fsdp2", "zero-2" or "zero-3"; every trainer configures it anew.

    Args:
        layer: what FSDP2 wraps.
        persistent: weights of the largest parameters that ZeRO-3 keeps whole between uses.
    """
    unset_hf_deepspeed_config()  # else models are split when they are made
    if strategy in ("alone", "ddp"):
        return {}
    if strategy == "fsdp2":
        pretend_to_be_on_gpus()
        fsdp = {**FSDP, "transformer_layer_cls_to_wrap": [layer], "state_dict_type": "SHARDED_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": fsdp, "accelerator_config": {"use_configured_state": True}}
    AcceleratorState._reset_state(True)
    config = zero_config(int(strategy[-1]))
    if strategy == "zero-3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    return {"deepspeed": config}


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and buffers by name, however ranks hold them."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: _whole(one) for name, one in found.items()}


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    return whole(tensor) if is_partitioned(tensor) else tensor.detach().clone()


def gradients(
    folder: Path, strategy: str, config: BalanceConfig, load: Callable[[], PreTrainedModel] = mixtral, **split: object
) -> dict[str, Tensor]:
    """Of one step over eight rows, from what it did to the weights; and the balance loss that was logged."""
    own = sharding(strategy)
    arguments = tiny_arguments(folder, **own) if load is not mixtral else None  # from here on loading splits models
    model = load()
    before = whole_weights(model)
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    training = trainer(folder, config, model, learning_rate=RATE, weight_decay=0.0, **logs, **own, **split)
    training.train()
    del arguments
    found = {name: (before[name] - one) / RATE for name, one in whole_weights(training.model).items()}
    assert any(map(is_partitioned, training.model.parameters())) == strategy.startswith("zero")
    logged = training.state.log_history[0]["balance_loss"]
    return found | {"logged": next(iter(found.values())).new_tensor([logged])}


def added(folder: Path, strategy: str, **split: object) -> dict[str, dict[str, Tensor]]:
    """By kind, what all losses together add to each gradient."""
    without = gradients(folder, strategy, WITHOUT, **split)
    found = {}
    for kind in KINDS:
        with_it = gradients(folder, strategy, all_losses(kind), **split)
        found[kind] = {name: with_it[name] - one for name, one in without.items()}
        found[kind]["logged"] = with_it["logged"]
    return found


def bias_trainer(folder: Path, strategy: str, **options: object):
    """Two steps of four rows of GLM-4 MoE, whose bias of the choice moves; a checkpoint after each."""
    own = sharding(strategy, "Glm4MoeDecoderLayer")
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 0.5}
    split = {"per_device_train_batch_size": 1 if own else 4, "gradient_accumulation_steps": 2 if own else 1}
    return trainer(folder, BIAS, biased("glm4_moe"), **saving, **split, **own, **options)


def moved_biases(training: object, resume: bool = False) -> dict[str, Tensor]:
    """All weights and biases after it."""
    training.train(resume_from_checkpoint=resume)
    return whole_weights(training.model)


def run_one_process(folder: str) -> None:
    """Every case under one strategy; what they came to is written for the test."""
    root, strategy, found = Path(folder), os.environ["STRATEGY"], {}
    if strategy != "fsdp2":
        without_compiling()
    for kind, one in added(root / "run", strategy, **CASES[strategy]).items():
        found |= {f"added/{kind}/{name}": tensor for name, tensor in one.items()}
    if strategy == "zero-3":
        load = partial(AutoModelForCausalLM.from_pretrained, root / "base")
        loaded = gradients(root / "run", strategy, all_losses("routers"), load, **SPLIT)
        found |= {f"loaded/routers/{name}": one for name, one in loaded.items()}
    training = bias_trainer(root / "bias", strategy)
    found |= {f"bias/whole/{name}": one for name, one in moved_biases(training).items()}
    if strategy == "fsdp2":
        with pytest.raises(ValueError, match="sharded when they were loaded only by"):
            trainer(root / "run", BIAS, training.model)
    with pytest.raises(Crash):
        bias_trainer(root / "stopped", strategy, callbacks=[CrashAt(2)]).train()
    dist.barrier()
    resumed = moved_biases(bias_trainer(root / "stopped", strategy), resume=True)
    found |= {f"bias/resumed/{name}": one for name, one in resumed.items()}
    leave_found(found, root)
