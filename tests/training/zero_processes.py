"""What each of two processes trains under DeepSpeed ZeRO for `test_deepspeed.py`."""

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.tickets.configs import GradualPruningConfig, LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.training.trainer import SparseTrainer
from tiny_models import tiny_model
from training.search_processes import LATE, search_early, search_late
from training.tiny_training import AtBegin, AtStep, Crash, CrashAt, tied_classifier, tiny_trainer
from training.two_processes import leave_found, without_compiling


CASES = {
    "static": StaticSparsityConfig(sparsity=0.6),
    "random": StaticSparsityConfig(sparsity=0.6, score="random", budget="uniform"),
    "gradual": GradualPruningConfig(sparsity=0.7, end_step=4, every=2),
}
COMPARED = ("static-1", "static-2", "static-3", "random-3", "gradual-1", "gradual-2", "gradual-3")  # with one process
RESUMED = (2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# By name, the stage, what is changed about its config, and about the Trainer's arguments.
VARIANTS = {"bf16-1": (1, {}, {"bf16": True}), "offload-3": (3, OFFLOAD, {"bf16": True})}
REFUSED = {
    "gradient": (2, StaticSparsityConfig(sparsity=0.6, score="gradient"), "score='gradient' reads gradients"),
    "stage 0": (0, StaticSparsityConfig(sparsity=0.6), "masks are kept by ZeRO-1, ZeRO-2 and ZeRO-3"),
    "search": (3, LotteryTicketConfig(sparsity=0.5, rounds=1, score="gradient"), "score='gradient' reads gradients"),
    "search at stage 0": (0, LotteryTicketConfig(sparsity=0.5, rounds=1), "a search rewinds what ZeRO-1, ZeRO-2 and"),
    "early bird": (0, EarlyBirdConfig(heads=0.5, neurons=0.5), "a search rewinds what ZeRO-1, ZeRO-2 and"),
}
SEARCHED_UNDER_ZERO_2 = dataclasses.replace(LATE, final_training=False)
SAVING = {"save_strategy": "steps", "save_steps": 2}


def zero_config(stage: int, **changes: object) -> dict:
    """A DeepSpeed config that follows the Trainer's arguments."""
    zero = {"stage": stage, **changes}
    if stage == 3:
        # Parameters of up to 400 weights stay gathered between steps, the larger ones do not.
        defaults = {"stage3_param_persistence_threshold": 400, "stage3_gather_16bit_weights_on_model_save": True}
        zero = defaults | zero
    follow = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    own = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}
    return dict.fromkeys(follow, "auto") | own


def tiny_mixture() -> PreTrainedModel:
    """Three experts in each 3-D parameter, of which two ranks hold one and a half each."""
    return tiny_model("mixtral", "sequence_classification", hidden_size=20, intermediate_size=20, num_local_experts=3)


def plain_trainer(
    folder: Path, config: object, batch: int, model: Callable[[], PreTrainedModel] = tied_classifier, **options: object
):
    """Six steps of four rows in order, however many processes share them."""
    order = {"train_sampling_strategy": "sequential", "average_tokens_across_devices": False, "max_grad_norm": 0.5}
    return tiny_trainer(folder, config, model=model(), per_device_train_batch_size=batch, **{**order, **options})


def zero_trainer(folder: Path, stage: int, config: object, changes: dict | None = None, **options: object):
    """One of two processes; every trainer configures DeepSpeed anew."""
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    trainer = plain_trainer(folder, config, 2, deepspeed=zero_config(stage, **(changes or {})), **options)
    assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    assert trainer.accelerator.num_processes == 2
    return trainer


def whole(parameter: Tensor) -> Tensor:
    """What the model computes with."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().contiguous().clone()


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All whole weights by canonical name."""
    return {name: whole(one) for name, one in named_canonical_parameters(model).items()}


def look_at_zeros(trainer: SparseTrainer) -> AtStep:
    """After each step, by DeepSpeed's own ways: pruned weights, masters and moments are zero."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    def look(model: PreTrainedModel, **_: object) -> None:
        parameters = named_canonical_parameters(model)
        for name, mask in trainer.ticket.masks().items():
            moments = [safe_get_full_optimizer_state(parameters[name], key) for key in ("exp_avg", "exp_avg_sq")]
            assert all(moment[mask].any() for moment in moments), name
            for tensor in (whole(parameters[name]), safe_get_full_fp32_param(parameters[name]), *moments):
                assert not tensor[~mask].any(), name

    return AtStep(look)


def found_after(name: str, trainer: SparseTrainer, resume: bool = False) -> dict[str, Tensor]:
    """Train, save, and keep weights and masks."""
    looking = look_at_zeros(trainer)
    trainer.add_callback(looking)
    trainer.train(resume_from_checkpoint=resume)
    assert looking.calls
    trainer.save_model()
    found = {f"{name}/weight/{key}": one for key, one in weights_of(trainer.model).items()}
    return found | {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}


def stopped_and_resumed(folder: Path, stage: int) -> SparseTrainer:
    """A trainer in the folder of a run that was killed at step 3, one step after its last checkpoint."""
    with pytest.raises(Crash):
        zero_trainer(folder, stage, CASES["gradual"], callbacks=[CrashAt(3)], **SAVING).train()
    dist.barrier()
    return zero_trainer(folder, stage, CASES["gradual"], **SAVING)


def search_trainer(stage: int, folder: Path, config: object, **options: object) -> SparseTrainer:
    """Its engine is the only one: those of earlier trainings are gone, with their masters and moments."""
    trainer = zero_trainer(folder, stage, config, **options)
    engines = []

    def look(**_: object) -> None:
        assert not any(engine() for engine in engines)
        engines.append(weakref.ref(trainer.deepspeed))

    trainer.add_callback(AtBegin(look))
    return trainer


def run_one_process(folder: str) -> None:
    """All runs; what they came to is written for the test."""
    without_compiling()
    root, found = Path(folder), {}
    for name in COMPARED:
        case, stage = name.split("-")
        found |= found_after(name, zero_trainer(root / name, int(stage), CASES[case]))
    for stage in RESUMED:
        name = f"resumed-{stage}"
        found |= found_after(name, stopped_and_resumed(root / name, stage), resume=True)
    for name, (stage, changes, options) in VARIANTS.items():
        found |= found_after(name, zero_trainer(root / name, stage, CASES["gradual"], changes, **options))
    ticket = StaticSparsityConfig(ticket=str(root / "ticket"))
    found |= found_after("ticket-2", zero_trainer(root / "ticket-2", 2, ticket))
    found |= found_after("mixture-3", zero_trainer(root / "mixture-3", 3, CASES["static"], model=tiny_mixture))
    found |= search_late(root, "zero2", partial(search_trainer, 2), weights_of, SEARCHED_UNDER_ZERO_2)
    found |= search_early(root, "zero3", partial(search_trainer, 3), weights_of)
    found |= search_late(root, "zero3", partial(search_trainer, 3, bf16=True), weights_of, LATE)
    for name, (stage, config, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            zero_trainer(root / name, stage, config).train()
    leave_found(found, root)
