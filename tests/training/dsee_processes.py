"""What each of two processes trains of a DSEE adapter under DDP, FSDP2 or ZeRO, for `test_dsee_sharded.py`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer

from sparse_hf import (
    DseeConfig,
    DseeMaskingCallback,
    DseeMaskingConfig,
    DseeSupportCallback,
    DseeTwoStageConfig,
    SparseTrainer,
)
from sparse_hf.algorithms.zero_partitions import is_partitioned
from training.balance_processes import sharding, whole_weights
from training.tiny_training import Crash, CrashAt, tiny_arguments, tiny_classifier, tiny_trainer
from training.two_processes import leave_found, without_compiling


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ADAPTER = dict(r=2, nnz=8, target_modules=["query", "value"], masked_modules=["key"], task_type="SEQ_CLS")
GRADUAL = DseeMaskingConfig(0.5, start_step=0, end_step=4, every=1, score="weight_and_update")
SAVING = {"save_strategy": "steps", "save_steps": 2}


def base_classifier():
    """20 rows and columns; no dropout."""
    return tiny_classifier(hidden_size=20, **NO_DROPOUT)


def adapted(base: object = None, **changes: object) -> PeftModel:
    """Query and value tuned, key only masked."""
    return get_peft_model(base or base_classifier(), DseeConfig(**{**ADAPTER, **changes}))


def dsee_trainer(
    folder: Path,
    strategy: str,
    model: Callable[[], PeftModel] = adapted,
    state: str = "FULL_STATE_DICT",
    **options: object,
) -> Trainer:
    """Six steps of four rows in order, however many processes share them; by a stock Trainer without `sparsity`."""
    own = sharding(strategy, "BertLayer", options.pop("persistent", 0))
    if strategy == "fsdp2":
        own["fsdp_config"]["state_dict_type"] = state
    arguments = tiny_arguments(folder, **own) if model is loaded else None  # from here on loading splits models
    order = {"train_sampling_strategy": "sequential", "average_tokens_across_devices": False, "max_grad_norm": 0.5}
    batch = {"per_device_train_batch_size": 4 if strategy == "alone" else 2}
    kind = SparseTrainer if "sparsity" in options else Trainer
    made = tiny_trainer(folder, model=model(), trainer_class=kind, **batch, **order, **own, **options)
    del arguments
    return made


def masked_at_once() -> PeftModel:
    """S1 from the start."""
    return adapted(base_sparsity=0.3)


def loaded() -> PeftModel:
    """The same, of a base that was loaded from a folder."""
    base = AutoModelForSequenceClassification.from_pretrained(os.environ["BASE"], **NO_DROPOUT)
    return adapted(base, base_sparsity=0.3)


# By name: the model, and what makes the other options of its trainer.
CASES = {
    "plain": (masked_at_once, dict),
    "gradual": (adapted, lambda: {"callbacks": [DseeMaskingCallback(GRADUAL)]}),
    "moving": (adapted, lambda: {"callbacks": [DseeSupportCallback(every=2, drop_fraction=0.5)]}),
    "two stages": (adapted, lambda: {"sparsity": DseeTwoStageConfig(0.5), "persistent": 400, **SAVING}),
}
# By name: how FSDP saves, and which training is stopped.
RESUMED = {"gradual": ("SHARDED_STATE_DICT", 1), "two stages": ("FULL_STATE_DICT", 2)}


def found_after(name: str, training: Trainer, resume: bool = False) -> dict[str, Tensor]:
    """Train, save, and keep what the model has, with its adapter and without."""
    training.train(resume_from_checkpoint=resume)
    training.save_model()
    found = {f"{name}/with/{key}": one for key, one in whole_weights(training.model).items()}
    with training.model.disable_adapter():
        found |= {f"{name}/without/{key}": one for key, one in whole_weights(training.model).items()}
    return found


def stop_between_stages(root: Path, strategy: str) -> None:
    """Stopped before the second stage has a checkpoint; in bf16, for which DeepSpeed rounds W0 and keeps masters."""
    found = {}
    for name in ("whole", "stopped"):
        options = {"sparsity": DseeTwoStageConfig(0.5), "bf16": True, **SAVING}
        if name == "stopped":
            killed = dsee_trainer(root / name, strategy, **options)
            killed.add_callback(CrashAt(1, 2))
            with pytest.raises(Crash):
                killed.train()
            dist.barrier()
        found |= found_after(name, dsee_trainer(root / name, strategy, **options), resume=name == "stopped")
    for name, one in found.items():
        if name.startswith("whole/"):
            assert torch.equal(one, found[name.replace("whole/", "stopped/", 1)]), name


def run_one_process(folder: str) -> None:
    """Every case under one strategy; what they came to is written for the test."""
    root, strategy, found = Path(folder), os.environ["STRATEGY"], {}
    by_deepspeed = strategy.startswith("zero")
    if by_deepspeed:
        without_compiling()
    for name, (model, options) in CASES.items():
        training = dsee_trainer(root / name, strategy, model, **options())
        if name == "moving" and by_deepspeed:
            with pytest.raises(ValueError, match="cannot move under DeepSpeed"):
                training.train()
        else:
            found |= found_after(name, training)
    for name, (state, stopped) in RESUMED.items():
        model, options = CASES[name]
        folder = root / f"{name} resumed"
        killed = dsee_trainer(folder, strategy, model, state, **SAVING | options())
        killed.add_callback(CrashAt(3, stopped))
        with pytest.raises(Crash):
            killed.train()
        dist.barrier()
        again = dsee_trainer(folder, strategy, model, state, **SAVING | options())
        found |= found_after(folder.name, again, resume=True)
    if strategy == "zero-2":
        stop_between_stages(root, strategy)
    if strategy == "zero-3":
        training = dsee_trainer(root / "loaded", strategy, loaded)
        assert all(map(is_partitioned, training.model.get_base_model().bert.embeddings.parameters()))
        found |= found_after("loaded", training)
    leave_found(found, root)
