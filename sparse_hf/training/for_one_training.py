"""What is changed about a trainer for one training of a search, and put back after it?"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput

from sparse_hf.algorithms.sharded_tensors import reshard
from sparse_hf.training.forget_training import forget_training
from sparse_hf.training.snapshot import save_snapshot
from sparse_hf.training.stateful_callbacks import set_callback_states, states_in_checkpoint


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


class TakeSnapshot(TrainerCallback):
    """Saves the model at the step to which later rounds rewind."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == self.step:
            save_snapshot(kwargs["model"], self.path, writes=args.should_save)


class AtTrainBegin(TrainerCallback):
    """Does something when a training begins, before every other callback: see `first_at_train_begin`."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.action()


@contextlib.contextmanager
def first_at_train_begin(trainer: Trainer, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` when parameters are sharded and the optimizer is ready, before any callback sees them."""
    callback = AtTrainBegin(action)
    trainer.callback_handler.callbacks.insert(0, callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


@contextlib.contextmanager
def with_arguments(trainer: Trainer, arguments: TrainingArguments) -> Iterator[None]:
    """Other training arguments than the user's."""
    users = trainer.args
    trainer.args = arguments
    try:
        yield
    finally:
        trainer.args = users


@contextlib.contextmanager
def with_callback(trainer: Trainer, callback: TrainerCallback | bool) -> Iterator[None]:
    """One more callback, or none if it is False."""
    if not callback:
        yield
        return
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


@contextlib.contextmanager
def without_model_init(trainer: Trainer) -> Iterator[None]:
    """`model_init` made the first model; called again in each `train`, it would undo rewinding."""
    model_init = trainer.model_init
    trainer.model_init = None
    try:
        yield
    finally:
        trainer.model_init = model_init


@contextlib.contextmanager
def without_early_stopping(trainer: Trainer) -> Iterator[None]:
    """Early stopping asks for evaluations, which a search for a ticket does not make."""
    stoppers = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    for one in stoppers:
        trainer.remove_callback(one)
    try:
        yield
    finally:
        for one in stoppers:
            trainer.add_callback(one)


def train_anew(
    trainer: "SparseTrainer", arguments: TrainingArguments, checkpoint: Path | None, counters: dict[str, dict]
) -> TrainOutput:
    """One of several trainings of a trainer, as if it were its first: new optimizer, same random numbers.

    Under ZeRO, what the weights are is decided when it begins: see `forget_training`.

    Args:
        arguments: of this training.
        checkpoint: to continue from.
        counters: of stateful callbacks before any training; see `callback_states`.
    """
    forget_training(trainer)
    set_callback_states(trainer, counters if checkpoint is None else counters | states_in_checkpoint(checkpoint))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = None  # a run of its own: steps begin at 0 again
    set_seed(trainer.args.seed)
    with with_arguments(trainer, arguments):
        output = trainer.train_once(None if checkpoint is None else str(checkpoint))
    reshard(trainer.model)
    return output
