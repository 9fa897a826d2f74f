"""Tiny trainings for the tests of this folder: a few rows, a 2-layer BERT of width 16, a handful of steps."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.trainer import SparseTrainer
from tiny_models import tiny_model


torch.set_num_threads(1)
# accelerate collects garbage at the start of every training; what was imported until now need not be searched again.
gc.freeze()

ROWS = 16
LENGTH = 5


def tiny_rows(rows: int = ROWS, seed: int = 0) -> list[dict]:
    """Labelled rows for a tiny BERT classifier."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return [{"input_ids": one, "labels": int(label)} for one, label in zip(ids, labels, strict=True)]


def tiny_classifier(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A 2-layer BERT classifier of width 16, with dropout 0.1."""
    changes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **changes}
    return tiny_model("bert", "sequence_classification", seed=seed, **changes)


def tied_classifier(**changes: object) -> PreTrainedModel:
    """No dropout, matrices of odd sizes for two ranks, and weights of few different magnitudes."""
    changes = {"hidden_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}
    model = tiny_classifier(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100).round_().div_(100)
    return model


def tiny_arguments(folder: Path, **changes: object) -> TrainingArguments:
    """Six steps of four rows on the CPU; nothing is logged, evaluated or saved."""
    defaults = dict(
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


def tiny_trainer(
    folder: Path,
    sparsity: object = None,
    model: nn.Module | None = None,
    trainer_class: type = SparseTrainer,
    **options: object,
) -> SparseTrainer:
    """A trainer of a tiny classifier; `options` named like a Trainer's go to it, the others to its arguments."""
    own = {name: options.pop(name) for name in _OF_TRAINER if name in options}
    own.setdefault("train_dataset", tiny_rows())
    model = tiny_classifier() if model is None and "model_init" not in own else model
    if trainer_class is SparseTrainer:
        own["sparsity"] = sparsity
    return trainer_class(model, tiny_arguments(folder, **options), **own)


_OF_TRAINER = ("train_dataset", "eval_dataset", "callbacks", "model_init", "optimizers", "compute_metrics")
_OF_TRAINER += ("data_collator", "optimizer_cls_and_kwargs")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names, and bit-equal tensors."""
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, differing


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether all tensors are bit-equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_zeros(model: nn.Module, masks: dict[str, Tensor], optimizer: object = None) -> None:
    """Pruned weights are +0.0, and the optimizer's moments of them zero."""
    parameters = named_canonical_parameters(model)
    states = {} if optimizer is None else optimizer.state
    assert masks
    for name, mask in masks.items():
        pruned = parameters[name].detach()[~mask]
        assert torch.equal(pruned, torch.zeros_like(pruned)), name
        assert not pruned.signbit().any(), f"-0.0 in {name}"
        for key, value in states.get(parameters[name], {}).items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert torch.equal(value[~mask], torch.zeros_like(value[~mask])), (name, key)


class AtStep(TrainerCallback):
    """Calls `check(**event)` at the end of every optimizer step, right after the update and the masking."""

    def __init__(self, check: Callable[..., None]) -> None:
        self.check = check
        self.calls = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.calls += 1
        self.check(step=state.global_step, **kwargs)


class AtBegin(TrainerCallback):
    """Calls `look(state=..., **event)` when a training begins."""

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def on_train_begin(self, args, state, control, **kwargs):
        self.look(args=args, state=state, **kwargs)


class Crash(Exception):
    """Stands for a killed process."""


class CrashAt(TrainerCallback):
    """Raises at the end of step `step` of training number `training` (1 is the first), before anything is saved."""

    def __init__(self, step: int, training: int = 1) -> None:
        self.step = step
        self.training = training

    def on_train_begin(self, args, state, control, **kwargs):
        self.training -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.training == 0 and state.global_step == self.step:
            raise Crash


def ticket_masks(trainer: SparseTrainer) -> dict[str, Tensor]:
    """The masks of a trainer's ticket."""
    ticket: Ticket = trainer.ticket
    return ticket.masks()


def raise_at_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    """Let call `number` (1 is the first) of `owner.name` crash before it does anything."""
    original, calls = getattr(owner, name), []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, crash)


def assert_same_search(whole: tuple, resumed: SparseTrainer) -> None:
    """The resumed search ended as `whole` did: (masks, weights, folder); so did each of its rounds."""
    masks, weights, folder = whole
    assert_same(ticket_masks(resumed), masks)
    assert_same(tensors(resumed.model), weights)
    for number in (1, 2):
        first = Ticket.from_pretrained(folder / f"round-{number}" / "ticket")
        second = Ticket.from_pretrained(Path(resumed.args.output_dir) / f"round-{number}" / "ticket")
        assert_same(first.masks(), second.masks())
        assert first.origin.base_fingerprint == second.origin.base_fingerprint
