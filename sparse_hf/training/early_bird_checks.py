"""What would make an early-bird search wrong, found before any training?"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparse_hf.anatomy.slim import check_stock_form
from sparse_hf.anatomy.units import find_units, table_of
from sparse_hf.tickets.draw_units import draw_units
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig, steps_of
from sparse_hf.training.sharding_checks import check_search


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


def check_before_early_bird(trainer: "SparseTrainer", config: EarlyBirdConfig, whole: nn.Module) -> None:
    """Everything that can be checked without training.

    Args:
        whole: the trainer's model, or its shapes where ranks are to hold parts of it.

    Raises:
        TypeError: not a `PreTrainedModel`.
        ValueError: an unsupported family or strategy, wrapped weights, a budget that empties a layer, a stock form
            that cannot be, or a draw that would never come.
    """
    model = trainer.model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Heads and neurons are cut from a `PreTrainedModel`, got {type(model).__name__}. Merge adapters first."
        )
    _check_sharding(trainer, config)
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"A search does not work in nn.DataParallel, which the Trainer uses for {trainer.args.n_gpu} GPUs in one "
            "process. Launch one process per GPU by `accelerate launch` or `torchrun`."
        )
    if trainer.args.enable_jit_checkpoint:
        raise ValueError("A search goes on from its own checkpoints, got `enable_jit_checkpoint`. Switch it off.")
    _check_parameters(model)
    table = config.unit_table or table_of(model)
    units = find_units(whole, table)
    if config.target_speedup is None:
        # Any scores show whether the budget can be met.
        masks = draw_units({one.key: torch.arange(one.count, dtype=torch.float32) for one in units}, config)
        if config.uniform:
            check_stock_form(whole, masks, table)
    _check_moments(trainer, config)


def _check_sharding(trainer: "SparseTrainer", config: EarlyBirdConfig) -> None:
    check_search(trainer, "coefficients")
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        raise ValueError(
            "A search begins with a model that is not split yet, got DTensors. Leave out `DistributedConfig`, or make "
            "a new trainer with the whole model."
        )
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if config.target_speedup is not None:
        raise ValueError(
            f"`target_speedup` measures a whole model on one device, got {config.target_speedup} with a model that is "
            "split. Give `heads` and `neurons`, as a search without FSDP and DeepSpeed finds them."
        )
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    if trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision == "no" and dtypes != {torch.float32}:
        raise ValueError(
            f"Coefficients are fp32, and FSDP2 splits weights of one dtype only, got {sorted(map(str, dtypes))}. Load "
            "the model in fp32, and set `bf16=True`."
        )


def _check_parameters(model: PreTrainedModel) -> None:
    """The smaller model is of the same class: what adapters or parametrisations did to a weight would not fit it."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name, _ in plain.named_parameters(remove_duplicate=False) if name not in found]
    if missing:
        raise ValueError(
            f"`{type(model).__name__}` must have the parameters of its class, but `{missing[0]}` is wrapped, "
            "quantised or parametrised. Merge adapters and remove parametrisations first."
        )


def _check_moments(trainer: "SparseTrainer", config: EarlyBirdConfig) -> None:
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    epoch, total = values[1], values[-1]
    if config.draw_at is not None:
        if steps_of(config.draw_at, epoch) > total:
            raise ValueError(
                f"`draw_at` must lie inside the training of {total} steps ({epoch} per epoch), got {config.draw_at}."
            )
        return
    every, earliest, longest = (
        steps_of(moment, epoch) for moment in (config.check_every, config.earliest, config.longest)
    )
    longest = min(longest, total)
    looks = longest // every - max(0, earliest - 1) // every
    if looks < config.history:
        raise ValueError(
            f"A mask settles after `history` = {config.history} looks, got room for {max(0, looks)} between step "
            f"{earliest} (`earliest`) and {longest} (`longest`) at every {every} steps. Lower `check_every`, raise "
            "`longest`, or give `draw_at`."
        )
