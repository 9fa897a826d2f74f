"""What would make a search wrong, found before hours of training?"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.anatomy.sites import Site, find_sites
from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.training.sharding_checks import check_search


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


def check_before_search(trainer: "SparseTrainer", config: LotteryTicketConfig) -> list[Site]:
    """The sites to prune, after everything that can be checked without training was.

    Raises:
        ValueError: parameters sharded in a way that cannot be rewound; no sites; a sparsity that leaves no weight; a
            round longer than the training; a rewinding step outside the dense round; checkpoints that stop a round
            before its end.
    """
    check_search(trainer, config.score)
    sites = find_sites(trainer.model, config.include, config.exclude)
    weights = sum(rows * columns for rows, columns in (site.shape for site in sites))
    if num_kept(weights, config.sparsity) < len(sites):
        raise ValueError(
            f"`sparsity` must leave at least one weight in each of the {len(sites)} matrices, got {config.sparsity} "
            f"of {weights} weights. Lower it, or exclude small matrices."
        )
    if trainer.args.enable_jit_checkpoint:
        raise ValueError(
            "A search goes on from its own checkpoints, got `enable_jit_checkpoint`, which would end a round before "
            "its last step. Switch it off, and set `save_strategy`."
        )
    total = _training_steps(trainer, trainer.args)
    length = _training_steps(trainer, round_arguments(config, trainer.args, Path(trainer.args.output_dir)))
    if length > total:
        given = "round_steps" if config.round_steps is not None else "round_epochs"
        raise ValueError(
            f"A round must not be longer than the whole training on this data ({total} steps), got "
            f"`{given}`={getattr(config, given)}. Lower it, or raise `num_train_epochs` or `max_steps`."
        )
    if config.rewind_step >= length:
        raise ValueError(f"`rewind_step` must lie inside the first round of {length} steps, got {config.rewind_step}.")
    return sites


def check_resume(trainer: "SparseTrainer", resume: str | bool | None) -> None:
    """Raise ValueError if `resume` names one checkpoint: a search is more than that."""
    if not isinstance(resume, (bool, type(None))) and Path(resume) != Path(trainer.args.output_dir):
        raise ValueError(
            f"A search is resumed by `resume_from_checkpoint=True` with its `output_dir`, got {resume!r}."
        )


def check_optimizers(trainer: "SparseTrainer") -> None:
    """Raise ValueError if the trainer was given a ready-made optimizer or scheduler: each round needs its own."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "A search makes a new optimizer in each round, got a ready-made one in `optimizers`. Set `args.optim`, or "
            "pass `optimizer_cls_and_kwargs`."
        )


def round_arguments(config: LotteryTicketConfig, arguments: TrainingArguments, folder: Path) -> TrainingArguments:
    """The user's arguments with a round's length and folder; rounds are not pushed to the Hub."""
    changed = copy.copy(arguments)
    changed.output_dir = str(folder)
    changed.push_to_hub = False
    if config.round_steps is not None:
        changed.max_steps = config.round_steps
    elif config.round_epochs is not None:
        changed.max_steps, changed.num_train_epochs = -1, config.round_epochs
    return changed


def _training_steps(trainer: "SparseTrainer", arguments: TrainingArguments) -> int:
    """Optimizer steps of a training with these arguments on the trainer's data."""
    return trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
