"""When does S1 change while a DSEE adapter is trained?"""

from typing import TYPE_CHECKING

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.bits import unpack_bits
from sparse_hf.algorithms.schedules import cubic_sparsity
from sparse_hf.algorithms.sharded_tensors import is_sharded
from sparse_hf.dsee.masking_config import DseeMaskingConfig


if TYPE_CHECKING:
    from sparse_hf.dsee.layer import DseeLayer


class DseeMaskingCallback(TrainerCallback):
    """Remove frozen weights while a DSEE adapter is tuned: `Trainer(..., callbacks=[DseeMaskingCallback(config)])`.

    Works in any Trainer. Masks are chosen from the updates as they are right after an optimizer step, and travel in
    the adapter's own file, so a resumed run continues with them. Under FSDP2 and ZeRO the masks are those of one
    process with the same updates; pass the callback to the Trainer's constructor there, since checkpoints are loaded
    into masks that exist.
    """

    def __init__(self, config: DseeMaskingConfig) -> None:
        self.config = config

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Make room for the masks of a checkpoint, where it is loaded by other ways than PEFT's."""
        if _loads_in_place() and dsee_layers(model):
            _make_room(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Check that there is an adapter to mask, and that the schedule ends within the training."""
        check_maskable(model)
        _check_sharding(model)
        end = self.config.start_step if self.config.end_step is None else self.config.end_step
        if end > state.max_steps:
            raise ValueError(
                f"S1 must be complete within the training of {state.max_steps} steps, got step {end}: lower "
                "`start_step` or `end_step`."
            )
        if args.load_best_model_at_end and end > 0:
            raise ValueError(
                "The best checkpoint may be one from before S1 was complete, got `load_best_model_at_end`: switch it "
                "off, or train in two stages by `SparseTrainer(sparsity=DseeTwoStageConfig(...))`."
            )
        first = self.config.start_step + (self.config.every if end > self.config.start_step else 0)
        if state.global_step >= max(1, min(first, end)) and not _removes_anything(model):
            raise ValueError(
                f"S1 of step {state.global_step} was not found in the checkpoint: pass `DseeMaskingCallback` to the "
                "Trainer's constructor."
            )
        if state.global_step == 0 and self.config.start_step == 0 and self.config.end_step is None:
            self._mask(model, self.config.sparsity)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Choose the masks that are due after this step."""
        config, step = self.config, state.global_step + 1
        end = config.start_step if config.end_step is None else config.end_step
        if not config.start_step <= step <= end:
            return
        if step == end:
            self._mask(model, config.sparsity)
        elif (step - config.start_step) % config.every == 0:
            sparsity = cubic_sparsity(step, config.start_step, end, config.sparsity)
            if sparsity > 0:
                self._mask(model, sparsity)

    def _mask(self, model: nn.Module, sparsity: float) -> None:
        from sparse_hf.dsee.masks import mask_by_update  # here, since it needs PEFT

        mask_by_update(model, dsee_adapter(model), sparsity, self.config.score)


def check_maskable(model: nn.Module) -> None:
    """Raise ValueError if the model has not one active DSEE adapter, or one whose S1 is N:M, which would be lost."""
    adapter = dsee_adapter(model)
    if pattern := model.peft_config[adapter].base_pattern:
        raise ValueError(
            f"Masking by the update is unstructured and would replace S1 of the pattern {pattern}: make the adapter "
            "without `base_pattern`."
        )


def dsee_layers(model: nn.Module) -> "list[DseeLayer]":
    """The adapted matrices of a model."""
    from sparse_hf.dsee.layer import DseeLayer  # here, since it needs PEFT

    return [module for module in model.modules() if isinstance(module, DseeLayer)]


def dsee_adapter(model: nn.Module) -> str:
    """The one active DSEE adapter.

    Raises:
        ValueError: there is none, or more than one is active.
    """
    active = {name for layer in dsee_layers(model) for name in layer.active_adapters}
    if len(active) != 1:
        found = ", ".join(f"`{name}`" for name in sorted(active)) or "none"
        raise ValueError(
            f"Masking by the update needs exactly one active DSEE adapter, got {found}: wrap the model by "
            "`get_peft_model(model, DseeConfig(...))`, or choose one by `set_adapter`."
        )
    return active.pop()


def _loads_in_place() -> bool:
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _check_sharding(model: nn.Module) -> None:
    if _loads_in_place() and not any(map(is_sharded, model.parameters())):
        raise ValueError(
            "Masking by the update works under FSDP2 and ZeRO-1, 2 and 3, got FSDP's first version, or DeepSpeed "
            "without ZeRO."
        )


def _make_room(model: nn.Module) -> None:
    """Masks that keep everything, for layers that have none."""
    adapter = dsee_adapter(model)
    for layer in dsee_layers(model):
        if adapter in layer.sparse_hf_dsee_scaling and adapter not in layer.sparse_hf_dsee_mask:
            layer.set_mask(adapter, torch.ones(layer.weight_shape, dtype=torch.bool))


def _removes_anything(model: nn.Module) -> bool:
    masks = [
        unpack_bits(mask, layer.weight_shape)
        for layer in dsee_layers(model)
        for mask in layer.sparse_hf_dsee_mask.values()
    ]
    return not all(bool(mask.all()) for mask in masks)
