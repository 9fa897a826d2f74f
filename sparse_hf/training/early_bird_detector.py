"""When has the mask of heads and neurons settled?"""

import logging
from pathlib import Path

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.algorithms.settling import MaskHistory, distance_matrix
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.mask_file import load_bits, save_bits
from sparse_hf.tickets.coefficients import UnitCoefficients
from sparse_hf.tickets.draw_units import draw_units, is_tied
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig, steps_of
from sparse_hf.tickets.latency_table import LatencyTable


logger = logging.getLogger(__name__)

HISTORY_FILE = "mask_history.json"
HISTORY_MASKS_FILE = "mask_history.safetensors"


class EarlyBirdDetector(TrainerCallback):
    """Looks at the would-be mask every so often, and stops the training when it is to be drawn.

    `checks` holds (step, masks) of every look, in order; `drawn_at` is the step of the draw, `settled` whether the
    rule of Early-Bird Tickets chose it. Looks before `earliest`, and at tied scores, count for nothing in that rule.
    """

    def __init__(
        self,
        coefficients: UnitCoefficients,
        config: EarlyBirdConfig,
        steps_per_epoch: int,
        latency: LatencyTable | None = None,
    ) -> None:
        self._coefficients = coefficients
        self._config = config
        self._latency = latency
        self._every = steps_of(config.check_every, steps_per_epoch)
        self._earliest = steps_of(config.earliest, steps_per_epoch)
        self._longest = steps_of(config.longest, steps_per_epoch)
        self._fixed = None if config.draw_at is None else steps_of(config.draw_at, steps_per_epoch)
        self._history = MaskHistory(config.history, config.threshold)
        self.checks: list[tuple[int, dict[str, Tensor]]] = []
        self.drawn_at: int | None = None
        self.settled = False
        self._tied = False  # the scores of the last look

    @property
    def mask_distance(self) -> float | None:
        """From the newest mask to the last ones, the largest; None until there are enough."""
        return self._history.largest_distance

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of the last look."""
        return self.checks[-1][1]

    def distances(self) -> list[list[float]]:
        """The mask distance between every two looks."""
        return distance_matrix([masks for _, masks in self.checks]).tolist()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look, and stop the training if this is the draw."""
        step = state.global_step
        last = step >= min(self._fixed or self._longest, state.max_steps)
        if step % self._every and not last:
            return
        self._look(step)
        self.settled = self._fixed is None and self._history.settled
        if self.settled or last:
            self.drawn_at = step
            control.should_training_stop = True
            self._say_how(step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Draw now if something else ended the training."""
        step = state.global_step
        if self.drawn_at is None:
            if not self.checks or self.checks[-1][0] < step:
                self._look(step)
            self.drawn_at = step
            self._say_how(step)

    def _look(self, step: int) -> None:
        """Draw the would-be mask and remember it, and whether scores were tied at its cut."""
        scores = self._coefficients.scores(self._config.ranking)
        masks = draw_units(scores, self._config, self._latency)
        self._tied = is_tied(scores, masks, self._config)
        self.checks.append((step, masks))
        if self._tied:
            self._history.clear()
        elif step >= self._earliest:
            self._history.add(step, masks)

    def _say_how(self, step: int) -> None:
        if self._tied:
            logger.warning(
                "The ticket was drawn at step %d on tied coefficients, so the order of units decided. Draw later.",
                step,
            )
        if self._fixed is None and not self.settled:
            logger.warning(
                "The mask had not settled by step %d (distance %s, threshold %s), so it was drawn there. Raise "
                "`longest`, `threshold` or `check_every` to let it settle.",
                step,
                self._history.largest_distance,
                self._config.threshold,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write what was seen into a checkpoint for which the Trainer wrote no model: FSDP's shards."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not (folder / HISTORY_FILE).is_file():
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Write what was seen so far into a checkpoint."""
        named = {f"{n}.{key}": mask for n, (_, masks) in enumerate(self.checks) for key, mask in masks.items()}
        if named:
            shapes = {name: tuple(mask.shape) for name, mask in named.items()}
            save_bits(folder / HISTORY_MASKS_FILE, {name: pack_bits(mask) for name, mask in named.items()}, shapes)
        counted = [step for step, _ in self._history.entries]
        steps = [step for step, _ in self.checks]
        content = {"steps": steps, "counted": counted, "drawn_at": self.drawn_at, "settled": self.settled}
        write_json(folder / HISTORY_FILE, content)

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is not one of an early-bird search, or damaged.
        """
        content = read_json(folder / HISTORY_FILE)
        steps = content["steps"]
        self.drawn_at, self.settled = content["drawn_at"], content["settled"]
        self.checks = [(step, {}) for step in steps]
        if steps:
            bits, shapes = load_bits(folder / HISTORY_MASKS_FILE)
            for name, packed in bits.items():
                number, _, key = name.partition(".")
                self.checks[int(number)][1][key] = unpack_bits(packed, shapes[name])
        for step, masks in self.checks:
            if step in content["counted"]:
                self._history.add(step, masks)
