"""Which combinations with sharded parameters would go wrong, found before training?"""

from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainingArguments

from sparse_hf.algorithms.sharded_tensors import is_sharded
from sparse_hf.algorithms.zero_partitions import is_partitioned
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.ticket import Ticket


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


GRADIENTS_ARE_GONE = (
    "score='gradient' reads gradients, which DeepSpeed does not leave behind: use score='magnitude', or draw the "
    "ticket without DeepSpeed and train under it."
)


def check_score(sparsity: StaticSparsityConfig | GradualPruningConfig | Ticket, model: nn.Module) -> None:
    """Raise ValueError if masks are to be drawn by gradients that ZeRO has consumed or never makes whole."""
    if getattr(sparsity, "score", None) == "gradient" and any(map(is_partitioned, model.parameters())):
        raise ValueError(GRADIENTS_ARE_GONE)


def check_best_model(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError if the best checkpoint is to be loaded at the end into what `from_pretrained` has sharded."""
    if args.load_best_model_at_end and getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "`load_best_model_at_end` must be False for a model that was sharded when it was loaded "
            "(`DistributedConfig`), which checkpoints cannot be loaded into again. Leave it out, and load the best "
            "checkpoint by `from_pretrained`."
        )


def check_search(trainer: "SparseTrainer", score: str) -> None:
    """Raise ValueError if a search cannot rewind what this trainer trains, or draw by `score` there."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"A search rewinds shards of FSDP2, got version {state.fsdp_plugin.fsdp_version}. Set `fsdp_version: 2`."
        )
    if not trainer.is_deepspeed_enabled:
        return
    stage = state.deepspeed_plugin.zero_stage
    if stage not in (1, 2, 3):
        raise ValueError(f"Under DeepSpeed, a search rewinds what ZeRO-1, ZeRO-2 and ZeRO-3 step, got stage {stage}.")
    if "scheduler" in state.deepspeed_plugin.deepspeed_config:
        raise ValueError(
            "A search trains more than once, got a `scheduler` in DeepSpeed's config, which knows one length. Leave "
            "it out, and set `lr_scheduler_type`."
        )
    if score == "gradient":
        raise ValueError(GRADIENTS_ARE_GONE)


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if ranks hold parts of the model's parameters, where `what` reads or writes whole ones."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(f"{what} works on whole parameters only, got FSDP or DeepSpeed: use one process or DDP.")
