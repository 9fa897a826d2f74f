"""DSEE's two trainings as one: tune, remove frozen weights by the size of the update, tune again.

What is on disk, in `output_dir`: `start.safetensors` (what is trained, as it was given), `first-stage/checkpoint-N`,
`first-stage.safetensors` (as the first stage left it), `search.json`, then the second stage's own `checkpoint-N`.
Masks are not stored between the stages: they follow from the trained updates.
"""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from sparse_hf.dsee.masking_config import DseeTwoStageConfig
from sparse_hf.training.checkpoints import last_complete_checkpoint
from sparse_hf.training.dsee_masking import check_maskable, dsee_adapter
from sparse_hf.training.for_one_training import first_at_train_begin, train_anew, without_model_init
from sparse_hf.training.search_checks import check_optimizers, check_resume
from sparse_hf.training.search_journal import begin_search, open_journal
from sparse_hf.training.sharding_checks import check_search
from sparse_hf.training.snapshot import restore_snapshot, save_snapshot
from sparse_hf.training.stateful_callbacks import callback_states, stopped_early
from sparse_hf.training.zero_stepping import copy_masters_to_model


if TYPE_CHECKING:
    from sparse_hf.tickets.ticket import Ticket
    from sparse_hf.training.trainer import SparseTrainer


class DseeTwoStages:
    """The two stages of one trainer; see `DseeTwoStageConfig`."""

    def __init__(self, trainer: "SparseTrainer", config: DseeTwoStageConfig) -> None:
        """
        Raises:
            ValueError: the trainer was given a ready-made optimizer, or its model has not one active DSEE adapter
                without `base_pattern`.
        """
        check_optimizers(trainer)
        check_maskable(trainer.model)
        self.trainer = trainer
        self.config = config
        self.stage = 0
        self._pristine: dict[str, dict] = {}

    @property
    def ticket(self) -> "Ticket":
        """There is none.

        Raises:
            RuntimeError: always; S1 is in the adapter.
        """
        raise RuntimeError("DSEE draws no ticket: its masks are saved with the adapter, by `save_pretrained`.")

    def log_entries(self) -> dict[str, float]:
        """What every log record of the Trainer says about the stages."""
        return {"stage": self.stage} if self.stage else {}

    def stopped(self) -> bool:
        """Whether the training that is resumed had ended before its last step."""
        return stopped_early(self.trainer)

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs to a checkpoint beside the adapter."""

    def adjust_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is trained beside the adapter."""

    def run(self, resume: str | bool | None) -> TrainOutput:
        """Both stages, or what is left of them.

        Args:
            resume: True continues what is in `output_dir`, bit for bit.

        Raises:
            ValueError, FileExistsError: the run cannot be right; nothing was trained or written.
        """
        trainer, config = self.trainer, self.config
        check_resume(trainer, resume)
        check_search(trainer, config.score)
        dsee_adapter(trainer.model)  # is there
        folder = Path(trainer.args.output_dir)
        journal = open_journal(folder, {"method": "dsee_two_stages", **vars(config)}, bool(resume))
        self._pristine = callback_states(trainer) | self._pristine
        trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
        begin_search(trainer, journal, folder / "start.safetensors", trained.__contains__)
        after_first = folder / "first-stage.safetensors"
        try:
            with without_model_init(trainer):
                if not journal.rounds:
                    self.stage = 1
                    start = folder / "start.safetensors"
                    self._restore(start, trained)
                    first = self._train(self._first_arguments(folder), start, trained)
                    journal.rounds.append({"steps": first.global_step, "training_loss": first.training_loss})
                    writes = trainer.args.should_save
                    save_snapshot(trainer.model, after_first, trained.__contains__, writes=writes)
                    if writes:
                        journal.save()
                    trainer.accelerator.wait_for_everyone()
                self.stage = 2
                self._restore(after_first, trained)
                self._mask()
                output = self._train(trainer.args, after_first, trained)
        finally:
            self.stage = 0
        journal.finished = True
        if trainer.args.should_save:
            journal.save()
        return output

    def _mask(self) -> None:
        from sparse_hf.dsee.masks import mask_by_update  # here, since it needs PEFT

        model = self.trainer.model
        mask_by_update(model, dsee_adapter(model), self.config.sparsity, self.config.score)

    def _restore(self, snapshot: Path, trained: set[str]) -> None:
        model = self.trainer.model
        restore_snapshot(model, snapshot, trained.__contains__)
        changed = [one for name, one in model.named_parameters() if name in trained]
        copy_masters_to_model(self.trainer.optimizer, changed)

    def _train(self, arguments: TrainingArguments, snapshot: Path, trained: set[str]) -> TrainOutput:
        """One stage, which begins with the snapshot, as the model does, or goes on from its last checkpoint."""
        trainer = self.trainer
        checkpoint = last_complete_checkpoint(Path(arguments.output_dir))

        def begin() -> None:
            if checkpoint is None:
                self._restore(snapshot, trained)
                if self.stage == 2:
                    self._mask()  # in bf16 W0 may have been rounded just now, or before the first stage

        # ZeRO's new masters come from what the model computes with, which may be rounded.
        begins = first_at_train_begin(trainer, begin) if trainer.is_deepspeed_enabled else nullcontext()
        with begins:
            return train_anew(trainer, arguments, checkpoint, self._pristine)

    def _first_arguments(self, folder: Path) -> TrainingArguments:
        changed = copy.copy(self.trainer.args)
        changed.output_dir = str(folder / "first-stage")
        changed.push_to_hub = False
        if self.config.first_epochs is not None:
            changed.max_steps, changed.num_train_epochs = -1, self.config.first_epochs
        if self.config.first_learning_rate is not None:
            changed.learning_rate = self.config.first_learning_rate
        return changed
