"""How long do the optimizer steps of a training take, without evaluation, saving and loading?"""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepTimer(TrainerCallback):
    """Adds up `steps` and the `seconds` between their beginnings and ends."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._began: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The first micro-batch of a step."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The optimizer has stepped."""
        if self._began is not None:
            self.steps += 1
            self.seconds += time.perf_counter() - self._began
            self._began = None
