"""When does a mask change, apply, get saved and come back in a Trainer run?

Facts of the Trainer that decide where things happen: optimizer and scheduler are ready at `on_train_begin`, after a
checkpoint's weights were loaded; weights are new and gradients still there at `on_optimizer_step`, where `global_step`
has not risen yet; `on_save` comes after the files were written.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.bits import pack_bits
from sparse_hf.algorithms.schedules import cubic_sparsity
from sparse_hf.algorithms.sharded_tensors import local_part
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.mask_file import MASKS_FILE, save_bits
from sparse_hf.tickets.config_json import SparsityConfig, config_to_dict
from sparse_hf.tickets.configs import GradualPruningConfig, LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.origin import TicketOrigin, origin_of
from sparse_hf.tickets.ticket import DESCRIPTION_FILE, Ticket
from sparse_hf.training.first_masks import draw_at, static_masks
from sparse_hf.training.mask_keeper import MaskKeeper
from sparse_hf.training.sharding_checks import check_best_model, check_score
from sparse_hf.training.ticket_parts import masks_of_ticket, parts_of_ticket
from sparse_hf.training.zero_universal import check_steps_apart


logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback):
    """Sparsity in any Trainer: `Trainer(..., callbacks=[SparsityCallback(config)])`.

    The zeros, masks and moments are those of `SparseTrainer`; two things differ in a stock Trainer: the clip norm is
    taken of unmasked gradients, and the mask file joins a checkpoint after the Trainer has pushed and rotated it.
    """

    def __init__(self, sparsity: SparsityConfig | Ticket, resume_from: str | Path | None = None) -> None:
        """
        Args:
            sparsity: a `StaticSparsityConfig`, a `GradualPruningConfig`, or a `Ticket` to train under.
            resume_from: the checkpoint whose masks a resumed run continues with, if it is not
                `<output_dir>/checkpoint-<step>`.

        Raises:
            TypeError: not one of these; a search needs `SparseTrainer`, because it trains more than once.
        """
        if isinstance(sparsity, (LotteryTicketConfig, EarlyBirdConfig)):
            raise TypeError(
                f"A search by `{type(sparsity).__name__}` trains more than once; a callback cannot: use "
                "`SparseTrainer(sparsity=...)`."
            )
        if not isinstance(sparsity, (StaticSparsityConfig, GradualPruningConfig, Ticket)):
            raise TypeError(
                "`sparsity` must be a StaticSparsityConfig, a GradualPruningConfig or a Ticket, got "
                f"{type(sparsity).__name__}."
            )
        self.sparsity = sparsity
        self.resume_from = resume_from
        self.keeper: MaskKeeper | None = None
        self._last: Ticket | None = None
        self._gathered: Ticket | None = None  # of all ranks, while one of them saves
        self._saved_in: Path | None = None
        self._origin = TicketOrigin()

    @property
    def ticket(self) -> Ticket:
        """The current masks as a ticket. Where parameters are sharded, all ranks ask for it together.

        Raises:
            RuntimeError: no training has begun yet.
        """
        if self._gathered is not None:
            return self._gathered
        if self.keeper is not None:
            # One whole mask at a time: packed, it is an eighth as large.
            bits = {name: pack_bits(mask).cpu() for name, mask in self.keeper.whole_masks()}
            return Ticket(bits, self.keeper.shapes, self._origin)
        if self._last is None:
            raise RuntimeError("There is no ticket yet: masks are drawn when training begins. Call `train()` first.")
        return self._last

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_dataloader: DataLoader | None = None,
        **kwargs: object,
    ) -> None:
        """Draw the masks, or read those of the checkpoint being resumed, and attach the keeper."""
        trained_before = self._last is not None or self.keeper is not None
        if self.keeper is not None:  # a batch-size search starts training again in the same run
            self.keeper.detach()
        self._saved_in = None
        self._check_schedule(state)
        check_score(self.sparsity, model)
        check_best_model(args, model)
        self._origin = self._describe(model)
        if state.global_step > 0:
            check_steps_apart(optimizer)
            masks = self._masks_of_checkpoint(args, state, model)
        else:
            # Weights that this callback has trained are no longer those of the ticket's base.
            masks = self._first_masks(model, train_dataloader, check_base=not trained_before)
        self.keeper = MaskKeeper(optimizer, named_canonical_parameters(model), masks)
        logger.info("Training with %.2f %% of the prunable weights at zero.", 100 * self.keeper.sparsity)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Tighten the masks of a gradual schedule right after the update."""
        config = self.sparsity
        if not isinstance(config, GradualPruningConfig):
            return
        step, end = state.global_step + 1, self._end_step(state)
        due = (step - config.start_step) % config.every == 0 or step == end
        if not due or not config.start_step <= step <= end:
            return
        sparsity = cubic_sparsity(step, config.start_step, end, config.sparsity, config.initial_sparsity)
        parameters = named_canonical_parameters(model)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        masks = draw_at(config, model, sparsity, step=step, previous=self.keeper.masks(), gradients=gradients)
        self.keeper.set_masks(masks)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Put the masks beside the checkpoint, unless `SparseTrainer` wrote them with it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with self.gathered():
            self._save_beside(folder, state)

    def _save_beside(self, folder: Path, state: TrainerState) -> None:
        # A mask file may lie there from an earlier run in the same folder, so its presence says nothing.
        if state.is_world_process_zero and folder.is_dir() and folder != self._saved_in:
            self.save_masks(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Take the best checkpoint's masks if its weights were loaded, then let go of the optimizer."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / MASKS_FILE).is_file():
            self.keeper.set_masks(parts_of_ticket(Ticket.from_pretrained(best), model))
        self._last = self.ticket
        self.keeper.detach()
        self.keeper = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, one rank can read `ticket` by itself; all ranks enter together. Nothing where nothing is sharded."""
        if self.keeper is not None and self.keeper.is_sharded:
            self._gathered = self.ticket
        try:
            yield
        finally:
            self._gathered = None

    def save_masks(self, folder: Path) -> None:
        """Write `sparse_masks.safetensors` and `sparse_hf.json` into an existing model folder, each durably.

        Before the first training there are no masks, and nothing is written.
        """
        if self.keeper is None and self._last is None:
            return
        ticket = self.ticket
        save_bits(folder / MASKS_FILE, ticket.bits, ticket.shapes)
        write_json(folder / DESCRIPTION_FILE, {**ticket.description(), "kind": "model"})
        self._saved_in = folder

    def adopt(self, ticket: Ticket) -> None:
        """Report and save `ticket`, whose zeros the weights carry already, before any training."""
        self._last = ticket

    def _describe(self, model: nn.Module) -> TicketOrigin:
        if isinstance(self.sparsity, Ticket):
            return self.sparsity.origin
        config = config_to_dict(self.sparsity)
        return origin_of(model, method=config["method"], config=config)

    def _first_masks(
        self, model: nn.Module, dataloader: DataLoader | None, check_base: bool = True
    ) -> dict[str, Tensor]:
        if isinstance(self.sparsity, Ticket):
            return masks_of_ticket(self.sparsity, model, check_base)
        if isinstance(self.sparsity, StaticSparsityConfig):
            config = replace(self.sparsity, check_base=self.sparsity.check_base and check_base)
            return static_masks(config, model, dataloader)
        # Gradients do not exist before the first step, so a gradient score begins dense.
        begins_dense = self.sparsity.start_step > 0 or self.sparsity.score == "gradient"
        return draw_at(
            replace(self.sparsity, score="magnitude") if begins_dense else self.sparsity,
            model,
            0.0 if begins_dense else self.sparsity.initial_sparsity,
        )

    def _masks_of_checkpoint(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> dict[str, Tensor]:
        """Masks are never read off the zeros of the weights: a kept weight may be zero too."""
        folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not (folder / MASKS_FILE).is_file():
            raise FileNotFoundError(
                f"The run resumes at step {state.global_step}, but `{folder}` holds no `{MASKS_FILE}`. "
                "Pass `SparsityCallback(..., resume_from=<the checkpoint>)`."
            )
        masks = masks_of_ticket(Ticket.from_pretrained(folder), model, check_base=False)
        for name, parameter in named_canonical_parameters(model).items():
            local = local_part(parameter)
            if name in masks and bool((local != 0).logical_and_(~masks[name].to(local.device)).any()):
                raise ValueError(
                    f"The masks in `{folder}` are not those of the weights the run resumes with (`{name}` differs). "
                    "Pass `SparsityCallback(..., resume_from=<the checkpoint>)`."
                )
        return masks

    def _end_step(self, state: TrainerState) -> int:
        if self.sparsity.end_step is not None:
            return self.sparsity.end_step
        return max(self.sparsity.start_step + 1, state.max_steps * 2 // 3)

    def _check_schedule(self, state: TrainerState) -> None:
        if isinstance(self.sparsity, GradualPruningConfig) and self._end_step(state) > state.max_steps:
            raise ValueError(
                f"Pruning must end within the training's {state.max_steps} steps, got "
                f"`end_step`={self._end_step(state)}. Lower `end_step` or `start_step`, or train longer."
            )
