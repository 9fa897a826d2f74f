"""A `transformers.Trainer` that trains sparse models: only what a callback cannot do is overridden."""

from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, TrainOutput

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.dsee.masking_config import DseeTwoStageConfig
from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.tickets.config_json import SparsityConfig
from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.callback import SparsityCallback
from sparse_hf.training.checkpoints import last_complete_checkpoint, steps_in_checkpoint
from sparse_hf.training.converted_checkpoints import load_converted, needs_conversion
from sparse_hf.training.dropped_tokens import DroppedTokens
from sparse_hf.training.dsee_two_stages import DseeTwoStages
from sparse_hf.training.early_bird_search import EarlyBirdSearch, describe_slim
from sparse_hf.training.expert_log import expert_entries
from sparse_hf.training.forget_training import give_back, held_by
from sparse_hf.training.load_balancer import LoadBalancer
from sparse_hf.training.lottery_search import LotterySearch
from sparse_hf.training.trainer_card import bring_from_checkpoint, complete_card
from sparse_hf.training.trainer_push import delete_outdated_after, holds_compressed, push_in_one_commit
from sparse_hf.training.zero_universal import options_of, put_right, reads_universal


# Methods that train more than once.
SEARCHES = {
    LotteryTicketConfig: LotterySearch,
    EarlyBirdConfig: EarlyBirdSearch,
    DseeTwoStageConfig: DseeTwoStages,
}


class SparseTrainer(Trainer):
    """A Trainer with two more arguments, `sparsity` and `balance`; without them, it is a Trainer.

    Pruned weights, their gradients and their optimizer moments are exactly zero at every step, on any torch optimizer,
    under gradient accumulation, mixed precision, gradient checkpointing and `torch.compile`; gradients are masked
    before the clip norm is taken. State dicts and checkpoints have the keys of the stock model; masks travel in a file
    of their own beside them, and resuming continues bit for bit.
    """

    def __init__(
        self,
        *args: object,
        sparsity: SparsityConfig | DseeTwoStageConfig | Ticket | StructuredTicket | None = None,
        balance: BalanceConfig | None = None,
        **kwargs: object,
    ) -> None:
        """
        Args:
            sparsity: a config (`LotteryTicketConfig`, `EarlyBirdConfig`, `GradualPruningConfig`,
                `StaticSparsityConfig`, or `DseeTwoStageConfig` for a model with a DSEE adapter), a `Ticket` to train
                under, or a `StructuredTicket` to which the model is cut. The other arguments are those of
                `transformers.Trainer`. Where units are cut, `trainer.model` becomes a new, smaller model; the one
                passed stays whole.
            balance: a load-balancing loss for a mixture of experts, see `BalanceConfig`. The loss that is logged stays
                the task's, in training and evaluation; `balance_loss` and the experts' load are logged beside it.
        """
        super().__init__(*args, **kwargs)
        self._load_balancer = None if balance is None else LoadBalancer(self, balance)
        if self._load_balancer is not None:
            self.add_callback(self._load_balancer)
        self._dropped_tokens = DroppedTokens()
        self.add_callback(self._dropped_tokens)
        self.sparsity = sparsity
        search = SEARCHES.get(type(sparsity))
        self.search = None if search is None else search(self, sparsity)
        self._structured_ticket: StructuredTicket | None = None
        self._sparsity_callback: SparsityCallback | None = None
        self._stepped_shards: list[list[nn.Parameter]] | None = None  # of an optimizer that is being prepared
        self._told_options: list[dict] = []  # of an optimizer whose state DeepSpeed is about to read
        self._resumed_at: int | None = None  # step of the checkpoint that the running training continues
        if isinstance(sparsity, StructuredTicket):
            self._train_slim(sparsity)
        elif sparsity is not None and self.search is None:
            self.train_under(sparsity)

    @property
    def ticket(self) -> Ticket | StructuredTicket:
        """The ticket found, or the masks in use.

        Raises:
            RuntimeError: there are no masks (yet).
        """
        if self.search is not None:
            return self.search.ticket
        if self._structured_ticket is not None:
            return self._structured_ticket
        if self._sparsity_callback is None:
            raise RuntimeError("There is no ticket: this trainer has no `sparsity`. Pass a config or a Ticket.")
        return self._sparsity_callback.ticket

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object) -> TrainOutput:
        """Train; with the config of a search, run the whole search and train the ticket that it finds.

        Args:
            resume_from_checkpoint: True continues from the last checkpoint that was written whole, bit for bit as if
                the run had not stopped; a search is continued where it was. (The Trainer skips the evaluation at the
                end of an epoch when it resumes from a checkpoint of the epoch's last step: with
                `eval_strategy="epoch"`, set `save_strategy="epoch"` too.)

        Raises:
            ValueError: a search cannot be right, or was given what only one training takes (`trial`).
        """
        if self.search is not None:
            if any(given is not None for given in (*args, *kwargs.values())):
                raise ValueError(
                    "A search trains more than once, so `train` takes nothing but `resume_from_checkpoint` there. For "
                    "a hyper-parameter search, make a trainer per trial."
                )
            return self.search.run(resume_from_checkpoint)
        return self.train_once(resume_from_checkpoint, *args, **kwargs)

    def train_under(self, sparsity: SparsityConfig | Ticket | None, already_applied: bool = False) -> None:
        """Replace the sparsity of the next `train_once`; None trains dense.

        Args:
            already_applied: the model carries the zeros of this ticket, so that saving it writes its masks.
        """
        if self._sparsity_callback is not None:
            self.remove_callback(self._sparsity_callback)
        self._sparsity_callback = None
        if sparsity is not None:
            self._sparsity_callback = SparsityCallback(sparsity)
            self.add_callback(self._sparsity_callback)
            if already_applied:
                self._sparsity_callback.adopt(sparsity)

    def train_once(
        self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object
    ) -> TrainOutput:
        """One ordinary training run under the current sparsity."""
        if self.sparsity is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            # Of sharded weights, masks are written after everything else, this file last.
            needed = None if self._sparsity_callback is None else DESCRIPTION_FILE
            checkpoint = last_complete_checkpoint(Path(self.args.output_dir), needed)
            if checkpoint is None:
                masks = "" if needed is None else ", masks included,"
                raise ValueError(
                    f"`resume_from_checkpoint=True` needs a complete checkpoint{masks} in `{self.args.output_dir}`, "
                    "found none. Start without it."
                )
            resume_from_checkpoint = str(checkpoint)
        self._resumed_at = steps_in_checkpoint(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if resume_from_checkpoint and self._sparsity_callback is not None:
            self._sparsity_callback.resume_from = resume_from_checkpoint  # DeepSpeed loads it by other ways than ours
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resumed_at = None

    def replace_model(self, model: PreTrainedModel) -> None:
        """Go on with another model, such as a smaller one; optimizer and scheduler are made anew."""
        self.model = self.model_wrapped = self.callback_handler.model = model
        self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """The Trainer's, with a group of its own for what a search trains beside the weights."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.search is not None and not made_before:
            self.search.adjust_optimizer(optimizer)
            self._stepped_shards = held_by(optimizer)
        return optimizer

    def create_scheduler(self, *args: object, **kwargs: object) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's; accelerate has prepared the optimizer by now."""
        give_back(self._stepped_shards, self.optimizer)
        self._stepped_shards = None
        scheduler = super().create_scheduler(*args, **kwargs)
        if reads_universal(self.args):
            self._told_options = options_of(self.optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and reads_universal(self.args):
            put_right(self.optimizer, self._told_options)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[int | None, ...]:
        """The Trainer's, but no epoch is left of a training that had ended when its last checkpoint was written.

        The Trainer itself makes one more step then, if the end lies within an epoch.
        """
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self._resumed_at is not None:
            ended = self._resumed_at >= max_steps or (self.search is not None and self.search.stopped())
            epochs = 0 if ended else epochs
        return (epochs, *others, max_steps)

    def get_batch_samples(self, *args: object, **kwargs: object) -> tuple[list, torch.Tensor | int | None]:
        """The Trainer's; they are the micro-batches of one optimizer step."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._load_balancer is not None:
            self._load_balancer.begin_step(batches)
        return batches, count

    def training_step(self, model: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        """The Trainer's, with the balance loss in its backward pass."""
        if self._load_balancer is None:
            return super().training_step(model, *args, **kwargs)
        with self._load_balancer.joining(model):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """The Trainer's; in training, routers are read meanwhile."""
        balancer = self._load_balancer
        if balancer is None or balancer.reader is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with balancer.reading(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _train_slim(self, ticket: StructuredTicket) -> None:
        if self.model_init is not None or self.optimizer is not None:
            raise ValueError(
                "A structured ticket makes a new, smaller model, unknown to `model_init` and a ready-made optimizer. "
                "Pass `model=slim(model, ticket)` yourself, and no `sparsity`."
            )
        self._structured_ticket = ticket
        self.replace_model(cut_units(self.model, ticket.units))

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        self._mask_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> float | torch.Tensor:
        if grad_norm is None:  # without clipping, the norm is taken here, and NaN would spread to all gradients
            self._mask_gradients()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _mask_gradients(self) -> None:
        if self._sparsity_callback is not None and self._sparsity_callback.keeper is not None:
            self._sparsity_callback.keeper.mask_gradients()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_plainly() and needs_conversion(model or self.model, Path(resume_from_checkpoint)):
            load_converted(model or self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._sparsity_callback is not None:
            self._sparsity_callback.resume_from = resume_from_checkpoint

    def save_model(self, *args: object, **kwargs: object) -> None:
        """The Trainer's; called on all ranks, of which one writes."""
        gathered = nullcontext() if self._sparsity_callback is None else self._sparsity_callback.gathered()
        with gathered:
            super().save_model(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self._loads_plainly() and needs_conversion(self.model, best):
            load_converted(self.model, best)
        else:
            super()._load_best_model()

    def _loads_plainly(self) -> bool:
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Masks are written with the weights, before the Trainer pushes or rotates checkpoints."""
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and self._sparsity_callback is not None:
            self._sparsity_callback.save_masks(Path(output_dir or self.args.output_dir))
        if self.args.should_save and self.search is not None:
            self.search.save_beside(Path(output_dir or self.args.output_dir))
        if self.args.should_save and self._structured_ticket is not None:
            describe_slim(Path(output_dir or self.args.output_dir), self._structured_ticket)

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Add the sparsity, and the round of a search, to every record; to those of training how experts are used."""
        if self._sparsity_callback is not None and self._sparsity_callback.keeper is not None:
            logs["sparsity"] = self._sparsity_callback.keeper.sparsity
        if self.search is not None:
            logs.update({name: value for name, value in self.search.log_entries().items() if name not in logs})
        if "loss" in logs:
            callbacks = self.callback_handler.callbacks
            logs.update(expert_entries(callbacks, self._load_balancer, self._dropped_tokens))
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """As the Trainer's; the card tells what is sparse in the output folder, and then what the Trainer's tells.

        Masks are written beside it first. A model in which nothing is sparse keeps the Trainer's card.
        """
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            if self._sparsity_callback is not None:
                self._sparsity_callback.save_masks(Path(self.args.output_dir))
            complete_card(self)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        compressed: bool | Literal["zstd"] = False,
        **kwargs: object,
    ) -> CommitInfo | Future | None:
        """The Trainer's, with masks and a card.

        Args:
            compressed: push what `save_compressed` makes of the output folder, which keeps its dense files; "zstd":
                with values coded too.

        A compressed push deletes a dense checkpoint at the top of the repository in the same commit, and a dense one a
        compressed.
        """
        options = {} if private is None else {"private": private}
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **options)
        if compressed or holds_compressed(self, token, revision):
            return push_in_one_commit(self, compressed, commit_message, blocking, token, revision, **kwargs)
        return super().push_to_hub(commit_message, blocking, token, revision, **options, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Masks and a card go along; the Trainer takes nothing but stock files from a checkpoint."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return  # as the Trainer does; and what is being uploaded must not change
        bring_from_checkpoint(Path(checkpoint_folder), Path(self.args.output_dir))
        super().create_model_card(model_name=Path(self.hub_model_id).name)
        complete_card(self, Path(checkpoint_folder))
        earlier = list(self.push_in_progress.jobs) if running else []
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = self.push_in_progress.jobs
        jobs.append(delete_outdated_after(self, [job for job in jobs if job not in earlier]))
