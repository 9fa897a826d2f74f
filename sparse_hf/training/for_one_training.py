"""What is changed about a trainer for one training of a search, and put back after it?"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from sparse_hf.training.snapshot import save_snapshot


class TakeSnapshot(TrainerCallback):
    """Saves the model at the step to which later rounds rewind."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == self.step and args.should_save:
            save_snapshot(kwargs["model"], self.path)


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


def forget_tensorboard_folder(trainer: Trainer) -> None:
    """A TensorBoard run of its own for the next training: steps begin at 0 again."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = None
