"""Iterative magnitude pruning with rewinding, as rounds of one trainer that survive a kill at any moment.

Under `output_dir`:
    search.json             config; per finished round its sparsity, metrics and seconds
    start.safetensors       the model as it was given, head and buffers included
    rewind.safetensors      the model at `rewind_step` of the dense round, when that is not 0
    round-1, round-2, ...   checkpoints of a round; `ticket/` and `head.safetensors` once it is finished
    ticket                  the ticket found; beside it the final training's own checkpoints
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from sparse_hf.anatomy.canonical_names import head_names, named_canonical_parameters
from sparse_hf.anatomy.sites import Site
from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.tickets.config_json import config_to_dict
from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.origin import origin_of
from sparse_hf.tickets.site_pieces import pieces_of
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.checkpoints import last_complete_checkpoint
from sparse_hf.training.first_masks import seeded, site_gradients
from sparse_hf.training.for_one_training import (
    TakeSnapshot,
    first_at_train_begin,
    train_anew,
    with_callback,
    without_model_init,
)
from sparse_hf.training.round_metrics import check_finite, metrics_of_weights
from sparse_hf.training.search_checks import check_before_search, check_optimizers, check_resume, round_arguments
from sparse_hf.training.search_journal import SearchJournal, begin_search, open_journal
from sparse_hf.training.snapshot import everything, restore_snapshot, save_snapshot
from sparse_hf.training.stateful_callbacks import callback_states, stopped_early
from sparse_hf.training.ticket_parts import parts_of_ticket, ticket_of_parts, zero_pruned_by
from sparse_hf.training.zero_stepping import copy_masters_to_model


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


class LotterySearch:
    """The rounds of a lottery ticket search around a `SparseTrainer`."""

    def __init__(self, trainer: "SparseTrainer", config: LotteryTicketConfig) -> None:
        """
        Args:
            trainer: trains one round at a time by `train_once`.

        Raises:
            ValueError: the trainer was given a ready-made optimizer.
        """
        check_optimizers(trainer)
        self.trainer = trainer
        self.config = config
        self.round = 0  # 1-based while a round runs; 0 outside, also in the final training
        self.sparsity = 0.0  # of the model being trained
        self.seconds = {"training": 0.0, "pruning": 0.0, "rewinding": 0.0, "saving": 0.0}
        self.records: list[dict] = []  # per finished round: sparsity drawn, metrics of its training, seconds
        self._ticket: Ticket | None = None
        self._pristine: dict[str, dict] = {}  # counters of callbacks before any training

    @property
    def ticket(self) -> Ticket:
        """The last ticket drawn.

        Raises:
            RuntimeError: no round is finished yet.
        """
        if self._ticket is None:
            raise RuntimeError("There is no ticket yet: no round is finished. Call `train()` first.")
        return self._ticket

    def log_entries(self) -> dict[str, float]:
        """What every log record of the Trainer says about the search: the round, and the sparsity being trained."""
        return {"sparsity": self.sparsity, "round": self.round} if self.round else {}

    def stopped(self) -> bool:
        """Whether the training that is resumed had ended before its last step."""
        return stopped_early(self.trainer)

    def save_beside(self, folder: Path) -> None:
        """Nothing: the masks that belong to a checkpoint are the callback's to save."""

    def adjust_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: a round trains the parameters that the model has."""

    def run(self, resume: str | bool | None) -> TrainOutput:
        """All rounds that are not finished yet, then the final training of the ticket.

        Args:
            resume: True continues the search in `output_dir`; a path is not accepted, since a search is more than one
                checkpoint.

        Raises:
            ValueError, FileExistsError: the search cannot be right; nothing was trained or written.
        """
        check_resume(self.trainer, resume)
        trainer, config = self.trainer, self.config
        self._folder = Path(trainer.args.output_dir)
        sites = check_before_search(trainer, config)
        journal = open_journal(self._folder, config_to_dict(config), bool(resume))
        # What a run of this trainer before this one (which may have crashed) left behind must not leak in.
        self._pristine = callback_states(trainer) | self._pristine
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        with self._timed("saving"):
            begin_search(trainer, journal, self._start)
        self.records = journal.rounds
        finished = len(journal.rounds)
        self._ticket = Ticket.from_pretrained(self._round_folder(finished) / "ticket") if finished else None
        steps = tqdm(
            total=config.rounds + config.final_training,
            initial=finished,
            desc="lottery ticket",
            unit="round",
            disable=trainer.args.disable_tqdm or not trainer.is_world_process_zero(),
        )
        with steps, without_model_init(trainer), self._no_round_afterwards():
            output = TrainOutput(0, 0.0, {})
            for number, sparsity in enumerate(config.sparsities(), start=1):
                if number <= finished:
                    continue
                steps.set_postfix_str(
                    f"round {number}/{config.rounds}, training at {self._current_sparsity():.1%} zeros"
                )
                output = self._run_round(number, sparsity, sites, journal)
                steps.update()
            self._publish_ticket(journal)
            if config.final_training:
                steps.set_postfix_str(f"training the ticket at {self._current_sparsity():.1%} zeros")
                output = self._train_ticket(sites, journal)
                steps.update()
            else:
                self._rewind(self._rewind_point())
                zero_pruned_by(self.ticket, trainer.model, trainer.optimizer)
                trainer.train_under(self.ticket, already_applied=True)  # what is saved from now on carries its masks
        metrics = {f"search_{name}_seconds": seconds for name, seconds in self.seconds.items()}
        return TrainOutput(output.global_step, output.training_loss, output.metrics | metrics)

    def _run_round(self, number: int, sparsity: float, sites: list[Site], journal: SearchJournal) -> TrainOutput:
        """Rewind, train under the current ticket, prune to `sparsity`, save."""
        before = dict(self.seconds)
        folder = self._round_folder(number)
        self.round = number
        output = self._train(folder, round_arguments(self.config, self.trainer.args, folder), sites)
        check_finite(self.trainer.model, output.training_loss, number, folder)
        metrics = metrics_of_weights(self.trainer.state, self.trainer.args)
        with self._timed("pruning"):
            masks = self._draw(number, sparsity, sites)
        with self._timed("saving"):
            if not self.config.rewind_head:
                head = folder / "head.safetensors"
                save_snapshot(self.trainer.model, head, self._is_head, writes=self.trainer.args.should_save)
        self._rewind(self._rewind_point())
        with self._timed("pruning"):
            ticket = ticket_of_parts(masks, self.trainer.model)
            fingerprint = base_fingerprint(named_canonical_parameters(self.trainer.model), ticket.bits)
            facts = {"method": "lottery_ticket", "config": config_to_dict(self.config)}
            ticket.origin = origin_of(self.trainer.model, base_fingerprint=fingerprint, metrics=metrics, **facts)
        with self._timed("saving"):
            if self.trainer.args.should_save:
                ticket.save_pretrained(folder / "ticket")
                seconds = {name: self.seconds[name] - before[name] for name in before}
                journal.rounds.append({"sparsity": ticket.sparsity, "metrics": metrics, "seconds": seconds})
                journal.save()
            self.trainer.accelerator.wait_for_everyone()
        self._ticket = ticket
        self.round = 0
        return output

    def _train_ticket(self, sites: list[Site], journal: SearchJournal) -> TrainOutput:
        """Train the rewound ticket with the arguments the user gave, from the head's first state."""
        output = self._train(self._folder, self.trainer.args, sites)
        with self._timed("saving"):
            metrics = metrics_of_weights(self.trainer.state, self.trainer.args)
            facts = {"method": "lottery_ticket", "config": config_to_dict(self.config), "metrics": metrics}
            fingerprint = self.ticket.origin.base_fingerprint
            self.ticket.origin = origin_of(self.trainer.model, base_fingerprint=fingerprint, **facts)
            journal.finished = True
            self._publish_ticket(journal)
        return output

    def _train(self, folder: Path, arguments: TrainingArguments, sites: list[Site]) -> TrainOutput:
        """One training from the rewound weights, or from the last whole checkpoint in `folder`."""
        trainer = self.trainer
        checkpoint = last_complete_checkpoint(folder, needed=None if self._ticket is None else DESCRIPTION_FILE)

        def begin() -> None:
            pieces_of(sites, named_canonical_parameters(trainer.model))  # what cannot be drawn is refused before hours
            if checkpoint is None:
                before = self.seconds["rewinding"]
                self._rewind_all()
                self.seconds["training"] -= self.seconds["rewinding"] - before  # during which this happens

        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not is_sharded:
            self._rewind_all()
        trainer.train_under(self._ticket)
        self.sparsity = self._current_sparsity()
        snapshot = TakeSnapshot(self.config.rewind_step, self._folder / "rewind.safetensors")
        takes_snapshot = self.round == 1 and self.config.rewind_step > 0
        # Engines and shards are made when a training begins, so that weights are written after that.
        begins = first_at_train_begin(trainer, begin) if is_sharded else contextlib.nullcontext()
        with self._timed("training"), with_callback(trainer, takes_snapshot and snapshot), begins:
            return train_anew(trainer, arguments, checkpoint, self._pristine)

    def _rewind_all(self) -> None:
        """To what the training that begins starts from; heads may go on from the round before."""
        self._rewind(self._start if self.round == 1 else self._rewind_point())
        if self.round > 1 and not self.config.rewind_head:
            self._rewind(self._round_folder(self.round - 1) / "head.safetensors", self._is_head)

    def _draw(self, number: int, sparsity: float, sites: list[Site]) -> dict:
        trainer, config = self.trainer, self.config
        gradients = None
        if config.score == "gradient":
            batches = (trainer.get_train_dataloader(), config.score_batches, config.seed)
            gradients = site_gradients(trainer.model, sites, *batches)
        return draw_masks(
            sites,
            named_canonical_parameters(trainer.model),
            sparsity,
            score=config.score,
            budget=config.budget,
            previous=None if self._ticket is None else parts_of_ticket(self._ticket, trainer.model),
            gradients=gradients,
            generator=seeded(config.seed, number),
        )

    def _rewind(self, snapshot: Path, wanted: Callable[[str], bool] = everything) -> None:
        """Restore every tensor of the model that is `wanted`, head included, bit for bit."""
        with self._timed("rewinding"):
            restore_snapshot(self.trainer.model, snapshot, wanted)
            copy_masters_to_model(self.trainer.optimizer, self.trainer.model.parameters())

    @property
    def _start(self) -> Path:
        return self._folder / "start.safetensors"

    def _rewind_point(self) -> Path:
        if self.config.rewind_step == 0:
            return self._start
        late = self._folder / "rewind.safetensors"
        if not late.is_file():
            raise ValueError(
                f"The dense round stopped before step {self.config.rewind_step}, to which `rewind_step` would rewind. "
                "Lower `rewind_step`, or let the round train longer."
            )
        return late

    def _publish_ticket(self, journal: SearchJournal) -> None:
        if self.trainer.args.should_save:
            self.ticket.save_pretrained(self._folder / "ticket")
            journal.save()

    def _round_folder(self, number: int) -> Path:
        return self._folder / f"round-{number}"

    def _is_head(self, full_name: str) -> bool:
        parameters, buffers = head_names(self.trainer.model)
        return full_name in parameters or full_name in buffers

    def _current_sparsity(self) -> float:
        return 0.0 if self._ticket is None else self._ticket.sparsity

    @contextlib.contextmanager
    def _no_round_afterwards(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.round = 0

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
