"""What must a trainer forget of a training, so that the next one on the same model is as if it were its first?

What was seen of accelerate 1.15 and DeepSpeed 0.19.8 when `Trainer.train` is called again:

- FSDP2: the model stays as it is, and accelerate gives the new optimizer its shards. It finds them by address, which
  all empty shards share, so that a rank without rows of two parameters would hold one of them twice. And after an
  evaluation some parameters are whole, which an optimizer must not step.
- DeepSpeed: the Trainer keeps the old engine, which accelerate has destroyed, unless `model_wrapped` is the bare
  model; then the module gets a new engine, and trainings are bit-equal to the first. Two hooks on the module would
  keep the old engine alive, with its masters and moments.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparse_hf.algorithms.sharded_tensors import reshard


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


# What a DeepSpeed engine leaves on parameters of a model, which then would still count as partitioned.
ENGINES_OWN = ("_hp_mapping", "_z3_optimizer", "_zero_optimizer", "_dp_group")
ENGINES_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")


def forget_training(trainer: "SparseTrainer") -> None:
    """Let go of optimizer, scheduler and engine; nothing is left of a first training that did not happen.

    Under ZeRO the model keeps the weights that it computes with, in their precision, and not the masters: write those
    anew once the next training has begun.
    """
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    if trainer.is_fsdp_enabled:
        reshard(trainer.model)
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        hooks = [getattr(trainer.deepspeed, name) for name in ENGINES_HOOKS]
        for hook in filter(None, hooks):  # DeepCompile has removed its own
            hook.remove()
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
        for parameter in trainer.model.parameters():
            for name in ENGINES_OWN:
                parameter.__dict__.pop(name, None)
        trainer.accelerator.free_memory()  # destroys the engine


def held_by(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]] | None:
    """What each group steps, if FSDP2 has sharded it already; else None."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    return groups if all(isinstance(one, DTensor) for group in groups for one in group) else None


def give_back(groups: list[list[nn.Parameter]] | None, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer step what it did at `held_by`, whatever accelerate has made of empty shards since."""
    if groups is not None:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
