"""How does the number of experts per token change over a Trainer run, and how good is the model at each?"""

from collections.abc import Iterable

from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.top_k_schedules import scheduled_top_k
from sparse_hf.moe.top_k import get_top_k, largest_top_k, set_top_k, top_k_of
from sparse_hf.moe.top_k_schedule import TopKSchedule
from sparse_hf.training.router_freezing import check_freezing, set_frozen, trained_router_parameters


class TopKScheduleCallback(TrainerCallback):
    """SMoE-Dropout in any Trainer: `Trainer(..., callbacks=[TopKScheduleCallback(TopKSchedule(1, 8))])`.

    After s optimizer steps the model has k(s) experts per token: in the next step, in an evaluation, in the config of
    a checkpoint. A resumed training continues there. At the end k is `end`, or, if the best model was loaded, that
    with which it was best. A `SparseTrainer` logs `experts_per_token`. Routers are frozen meanwhile, unless the
    schedule says otherwise: no gradient, no weight decay. They stay as they are given; SMoE-Dropout's are random, as
    `upcycle` makes them by default.

    Attributes:
        k_of_last_step: experts per token in the optimizer step that was made last; None before the first.
    """

    def __init__(self, schedule: TopKSchedule) -> None:
        if not isinstance(schedule, TopKSchedule):
            raise TypeError(f"`schedule` must be a TopKSchedule, got {type(schedule).__name__}.")
        self.schedule = schedule
        self.k_of_last_step: int | None = None
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Check that the model can have every k of the schedule, freeze its routers, and set the first k."""
        most = largest_top_k(model)
        with top_k_of(model, self.schedule.start):
            set_top_k(model, self.schedule.end or most)
        if self.schedule.freeze_routers:
            check_freezing(args)
            set_frozen(self._frozen, False)  # a batch-size search starts training again in the same run
            self._frozen = trained_router_parameters(model)
            set_frozen(self._frozen, True)
        self._set(model, state, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Set the next step's k."""
        self.k_of_last_step = get_top_k(model)
        self._set(model, state, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Let routers be trained as before; k stays, or becomes the best model's."""
        set_frozen(self._frozen, False)
        self._frozen = []
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._set(model, state, state.best_global_step)

    def _set(self, model: nn.Module, state: TrainerState, step: int) -> None:
        schedule = self.schedule
        end = schedule.end or largest_top_k(model)
        steps = max(1, round(schedule.until * state.max_steps))
        set_top_k(model, scheduled_top_k(step, steps, schedule.start, end, schedule.shape))


def evaluate_top_k(
    trainer: Trainer, ks: Iterable[int] | None = None, eval_dataset: Dataset | None = None
) -> dict[int, dict[str, float]]:
    """The self-slimmable curve: metrics of one model with each number of experts per token.

    Args:
        trainer: of a mixture of experts; afterwards its model has as many experts per token as before.
        ks: numbers of experts per token; None: from 1 to all.
        eval_dataset: instead of the trainer's.

    Returns:
        per k what `trainer.evaluate` measures, `{1: {"loss": ..., "runtime": ...}, ...}`; it is logged as
        `top_1_loss` and so on.

    Raises:
        ValueError: another family, or a k that the model cannot have, see `set_top_k`; then nothing is measured.
    """
    model = trainer.model
    before = get_top_k(model)
    ks = list(range(1, largest_top_k(model) + 1) if ks is None else ks)
    try:
        for k in ks:
            set_top_k(model, k)
        return {k: _evaluate(trainer, k, eval_dataset) for k in ks}
    finally:
        set_top_k(model, before)


def _evaluate(trainer: Trainer, k: int, eval_dataset: Dataset | None) -> dict[str, float]:
    set_top_k(trainer.model, k)
    prefix = f"top_{k}"
    metrics = trainer.evaluate(eval_dataset, metric_key_prefix=prefix)
    return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(prefix)}
