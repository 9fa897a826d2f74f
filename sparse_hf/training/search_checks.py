"""What would make a search wrong, found before hours of training?"""

from typing import TYPE_CHECKING

from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.anatomy.sites import Site, find_sites
from sparse_hf.tickets.configs import LotteryTicketConfig


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


def check_before_search(trainer: "SparseTrainer", config: LotteryTicketConfig) -> list[Site]:
    """The sites to prune, after everything that can be checked without training was.

    Raises:
        ValueError: no sites; a sparsity that leaves no weight; a fixed optimizer; a round longer than the training; a
            rewinding step outside the dense round.
    """
    sites = find_sites(trainer.model, config.include, config.exclude)
    weights = sum(rows * columns for rows, columns in (site.shape for site in sites))
    if num_kept(weights, config.sparsity) < len(sites):
        raise ValueError(
            f"`sparsity` must leave at least one weight in each of the {len(sites)} matrices, got {config.sparsity} of "
            f"{weights} weights. Lower it, or exclude small matrices."
        )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "A search makes a new optimizer in each round, got a ready-made one in `optimizers`. Set `args.optim`, or "
            "pass `optimizer_cls_and_kwargs`."
        )
    total = training_steps(trainer)
    if config.round_steps is not None and config.round_steps > total:
        raise ValueError(
            f"A round must not be longer than the whole training on this data ({total} steps), got "
            f"`round_steps`={config.round_steps}. Lower it, or raise `num_train_epochs` or `max_steps`."
        )
    length = round_steps(config, trainer, total)
    if config.rewind_step >= length:
        raise ValueError(
            f"`rewind_step` must lie inside the first round of {length} steps, got {config.rewind_step}."
        )
    return sites


def training_steps(trainer: "SparseTrainer") -> int:
    """Optimizer steps of one whole training with the trainer's arguments and data."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def round_steps(config: LotteryTicketConfig, trainer: "SparseTrainer", total: int) -> int:
    """Optimizer steps of one round; `total` is the length of the whole training."""
    if config.round_steps is not None:
        return config.round_steps
    if config.round_epochs is None:
        return total
    per_epoch = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[1]
    return max(1, round(config.round_epochs * per_epoch))
