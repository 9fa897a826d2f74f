"""Search, draw and train: an early-bird ticket as three stages of one trainer that survive a kill at any moment.

Under `output_dir`:
    search.json                config; once drawn: the step, the mask distances, seconds
    start.safetensors          the model as it was given, head and buffers included
    latency.json               for a target speed-up: what was measured
    search/                    the search's own checkpoints
    coefficients.safetensors   as they were at the draw
    ticket/                    the ticket drawn
    checkpoint-N/ ...          of the smaller model's training
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.durable import write_file, write_json
from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.tickets.coefficients import UnitCoefficients, fold_coefficients
from sparse_hf.tickets.config_json import config_to_dict
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.latency_measure import measure_latency
from sparse_hf.tickets.latency_table import LatencyTable
from sparse_hf.tickets.origin import origin_of
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training.checkpoints import last_complete_checkpoint
from sparse_hf.training.early_bird_checks import check_before_early_bird
from sparse_hf.training.early_bird_detector import HISTORY_FILE, EarlyBirdDetector
from sparse_hf.training.early_bird_shards import (
    add_l1_gradient,
    built_whole,
    fill_from,
    forget_engine,
    gathered_where_used,
    without_weights,
)
from sparse_hf.training.for_one_training import (
    train_anew,
    with_callback,
    without_early_stopping,
    without_model_init,
)
from sparse_hf.training.forget_training import forget_training
from sparse_hf.training.search_checks import check_optimizers, check_resume
from sparse_hf.training.search_journal import SearchJournal, begin_search, open_journal
from sparse_hf.training.snapshot import restore_snapshot
from sparse_hf.training.stateful_callbacks import callback_states, stopped_early
from sparse_hf.training.step_timer import StepTimer


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


class EarlyBirdSearch:
    """The three stages around a `SparseTrainer`. `stage` is 1 while searching, 3 while the smaller model trains."""

    def __init__(self, trainer: "SparseTrainer", config: EarlyBirdConfig) -> None:
        """
        Raises:
            ValueError: the trainer was given a ready-made optimizer, or the model has no table of units.
        """
        check_optimizers(trainer)
        self.trainer = trainer
        self.config = config
        self.stage = 0
        self.drawn_at: int | None = None  # step of the draw
        self.steps: list[int] = []  # of all looks at the mask
        self.distances: list[list[float]] = []  # the mask distance between every two looks
        self.seconds = {"latency": 0.0, "search": 0.0, "draw": 0.0, "training": 0.0}
        self._coefficients: UnitCoefficients | None = None
        self._detector: EarlyBirdDetector | None = None
        self._ticket: StructuredTicket | None = None
        self._pristine: dict[str, dict] = {}
        self._cut_already = False
        self._empty: PreTrainedModel | None = None  # the whole model without weights, where ranks hold parts of it

    @property
    def ticket(self) -> StructuredTicket:
        """The ticket drawn.

        Raises:
            RuntimeError: nothing is drawn yet.
        """
        if self._ticket is None:
            raise RuntimeError("There is no ticket yet: nothing was drawn. Call `train()` first.")
        return self._ticket

    def log_entries(self) -> dict[str, float]:
        """What every log record of the Trainer says about the search."""
        if self.stage == 0:
            return {}
        distance = self._detector.mask_distance if self.stage == 1 and self._detector is not None else None
        return {"stage": self.stage} | ({} if distance is None else {"mask_distance": distance})

    def stopped(self) -> bool:
        """Whether the training that is resumed had ended before its last step."""
        if self.stage == 1:
            return self._detector is not None and self._detector.drawn_at is not None
        return stopped_early(self.trainer)

    def save_beside(self, folder: Path) -> None:
        """What belongs to a checkpoint beside the Trainer's own files."""
        if self.stage == 1:
            self._detector.save(folder)
        elif self._ticket is not None:
            describe_slim(folder, self._ticket)

    def run(self, resume: str | bool | None) -> TrainOutput:
        """Search and draw, unless that is done; then train the smaller model, which replaces `trainer.model`.

        Args:
            resume: True continues what is in `output_dir`, bit for bit.

        Raises:
            ValueError, FileExistsError: the search cannot be right; nothing was trained or written.
        """
        trainer = self.trainer
        check_resume(trainer, resume)
        if self._cut_already or self._empty is not None:
            state = f"cut already ({type(trainer.model).__name__})" if self._cut_already else "split already"
            raise ValueError(
                f"A search begins with a whole model, but this trainer's is {state}. Make a new trainer "
                "with the whole model, to resume the search or for another `output_dir`."
            )
        self._folder = Path(trainer.args.output_dir)
        is_split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        empty = without_weights(trainer.model) if is_split else None
        with built_whole(trainer):
            check_before_early_bird(trainer, self.config, trainer.model if empty is None else empty)
        journal = open_journal(self._folder, config_to_dict(self.config), bool(resume))
        self._pristine = callback_states(trainer) | self._pristine
        begin_search(trainer, journal, self._start)
        done = bool(journal.rounds)
        bar = tqdm(
            total=2 + self.config.final_training,
            initial=2 * done,
            desc="early bird",
            unit="stage",
            disable=trainer.args.disable_tqdm or not trainer.is_world_process_zero(),
        )
        self._empty = empty
        searched, trained = StepTimer(), StepTimer()
        output = TrainOutput(0, 0.0, {})
        with bar, without_model_init(trainer), self._no_stage_afterwards():
            if not done:
                bar.set_postfix_str("1 of 3: search")
                output = self._search(searched)
                bar.update()
                bar.set_postfix_str("2 of 3: draw")
                self._draw(journal)
                bar.update()
            self._recall(journal)
            self._cut()
            if self.config.final_training:
                bar.set_postfix_str("3 of 3: training the smaller model")
                output = self._train(journal, trained)
                bar.update()
        return TrainOutput(output.global_step, output.training_loss, output.metrics | self._report(searched, trained))

    def adjust_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the coefficients a parameter group of their own, without weight decay, and add their L1 gradient."""
        if self.stage != 1:
            return
        values = list(self._coefficients.parameters())
        own = {id(value) for value in values}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        rate = self.config.coefficient_learning_rate
        optimizer.add_param_group({"params": values, "weight_decay": 0.0} | ({} if rate is None else {"lr": rate}))
        coefficients, strength = self._coefficients, self.config.l1

        def add_penalty(optimizer: torch.optim.Optimizer, *_: object) -> None:
            # Under a gradient scaler, a fused optimizer divides unclipped gradients by `grad_scale` itself.
            scale = getattr(optimizer, "grad_scale", None)
            add_l1_gradient(coefficients, strength if scale is None else strength * float(scale), optimizer)

        if strength:
            optimizer.register_step_pre_hook(add_penalty)

    def _search(self, timer: StepTimer) -> TrainOutput:
        """Stage 1: train everything, with coefficients, until the mask is to be drawn."""
        trainer, config = self.trainer, self.config
        restore_snapshot(trainer.model, self._start)
        latency = self._latency() if config.target_speedup is not None else None
        epoch = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[1]
        units = None if self._empty is None else find_units(self._empty, config.unit_table)
        self._coefficients = UnitCoefficients.attach(trainer.model, config.unit_table, units)
        self._detector = EarlyBirdDetector(self._coefficients, config, epoch, latency)
        checkpoint = last_complete_checkpoint(self._folder / "search", needed=HISTORY_FILE)
        if checkpoint is not None:
            self._detector.restore(checkpoint)
        self.stage = 1
        try:
            gathered, quiet = gathered_where_used(trainer.model, self._coefficients), without_early_stopping(trainer)
            with self._timed("search"), with_callback(trainer, self._detector), quiet, gathered:
                output = self._train_once(self._search_arguments(), checkpoint, timer)
        finally:
            self._coefficients.detach(trainer.model)
        return output

    def _search_arguments(self) -> TrainingArguments:
        """The user's arguments, in a folder of its own, without what only a finished model deserves."""
        changed = copy.copy(self.trainer.args)
        changed.output_dir = str(self._folder / "search")
        changed.push_to_hub = changed.load_best_model_at_end = changed.eval_on_start = False
        changed.eval_strategy = "no"
        if self.config.search_learning_rate is not None:
            changed.learning_rate = self.config.search_learning_rate
        return changed

    def _latency(self) -> LatencyTable:
        """Measured once, by the main process, so that every rank and a resumed run cut alike."""
        config, path = self.config, self._folder / "latency.json"
        found: list[dict | None] = [None]
        if self.trainer.is_world_process_zero():
            if not path.is_file():
                with self._timed("latency"):
                    shape = (config.latency_batch, config.latency_length)
                    table = measure_latency(
                        self.trainer.model,
                        config.speedup_of,
                        *shape,
                        multiple_of=config.neuron_multiple,
                        table=config.unit_table,
                    )
                write_json(path, table.to_dict())
            found = [read_json(path)]
        return LatencyTable.from_dict(broadcast_object_list(found)[0])

    def _draw(self, journal: SearchJournal) -> None:
        """Stage 2: write down the ticket, the coefficients and how the draw came about; the journal comes last."""
        detector = self._detector
        with self._timed("draw"):
            facts = {"drawn_at": detector.drawn_at, "settled": detector.settled}
            origin = origin_of(
                self.trainer.model, method="early_bird", config=config_to_dict(self.config), metrics=facts
            )
            self._ticket = StructuredTicket(detector.masks, origin)
            scores = self._coefficients.scores()
            forget_engine(self._coefficients)
            if self.trainer.args.should_save:
                write_file(self._folder / "coefficients.safetensors", lambda partial: save_file(scores, partial))
                self._ticket.save_pretrained(self._folder / "ticket")
        seconds = {name: self.seconds[name] for name in ("latency", "search", "draw")}
        steps = [step for step, _ in detector.checks]
        journal.rounds.append({**facts, "steps": steps, "distances": detector.distances(), "seconds": seconds})
        self._save_journal(journal)

    def _recall(self, journal: SearchJournal) -> None:
        drawn = journal.rounds[0]
        self.drawn_at, self.steps, self.distances = drawn["drawn_at"], drawn["steps"], drawn["distances"]
        self.seconds |= drawn["seconds"]
        if self._ticket is None:
            self._ticket = StructuredTicket.from_pretrained(self._folder / "ticket")

    def _cut(self) -> None:
        """Go back to the start and put the smaller model in the place of the whole one."""
        trainer, config = self.trainer, self.config
        with self._timed("draw"):
            units = self.ticket.units
            with built_whole(trainer):
                smaller = cut_units(self._model_at_start(), units, config.unit_table, config.uniform)
            if config.coefficients == "fold":
                values = load_file(self._folder / "coefficients.safetensors")
                kept = {key: values[key][mask] for key, mask in units.items()}
                fold_coefficients(smaller, kept, config.unit_table)
            forget_training(trainer)  # which knows the model that it was of
            trainer.replace_model(smaller)
            self._cut_already = True

    def _model_at_start(self) -> PreTrainedModel:
        if self._empty is not None:
            return fill_from(self._empty, self._start)
        restore_snapshot(self.trainer.model, self._start)
        return self.trainer.model

    def _train(self, journal: SearchJournal, timer: StepTimer) -> TrainOutput:
        """Stage 3: train the smaller model with the user's arguments."""
        self.stage = 3
        with self._timed("training"):
            output = self._train_once(self.trainer.args, last_complete_checkpoint(self._folder), timer)
        journal.finished = True
        self._save_journal(journal)
        return output

    def _train_once(self, arguments: TrainingArguments, checkpoint: Path | None, timer: StepTimer) -> TrainOutput:
        self.trainer.model_wrapped = self.trainer.model  # without the coefficients' or the whole model's wrapper
        with with_callback(self.trainer, timer):
            return train_anew(self.trainer, arguments, checkpoint, self._pristine)

    def _report(self, searched: StepTimer, trained: StepTimer) -> dict[str, float]:
        """Seconds of each stage, and what they saved of the same training of the whole model.

        The whole model's time is not measured: its steps are taken to last as long as those of the search, which have
        the coefficients (some percent) in them. Of a search or training that was resumed, the beginning was not timed,
        and nothing is said about what was saved.
        """
        report = {f"early_bird_{name}_seconds": seconds for name, seconds in self.seconds.items()}
        report["early_bird_drawn_at"] = self.drawn_at
        timed_whole = searched.steps == self.drawn_at and trained.steps == self.trainer.state.global_step
        if timed_whole and trained.steps:
            whole, small = searched.seconds / searched.steps, trained.seconds / trained.steps
            dense = self.seconds["training"] + trained.steps * (whole - small)
            report["early_bird_step_ratio"] = small / whole
            report["early_bird_saved_fraction"] = 1 - sum(self.seconds.values()) / dense
        return report

    @property
    def _start(self) -> Path:
        return self._folder / "start.safetensors"

    def _save_journal(self, journal: SearchJournal) -> None:
        if self.trainer.args.should_save:
            journal.save()
        self.trainer.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _no_stage_afterwards(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.stage = 0

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def describe_slim(folder: Path, ticket: StructuredTicket) -> None:
    """Write `sparse_hf.json` into the folder of a model that was cut to a ticket."""
    write_json(folder / DESCRIPTION_FILE, {**ticket.description(), "kind": "slim_model"})
