"""Searches for a lottery ticket, as each of two processes makes them under FSDP2 and ZeRO, and one process alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.trainer import SparseTrainer
from training.tiny_training import AtStep, Crash, CrashAt, assert_same, tied_classifier, tiny_rows


EARLY = LotteryTicketConfig(sparsity=0.6, rounds=2, final_training=False)
LATE = LotteryTicketConfig(sparsity=0.6, rounds=2, rewind_step=2, exclude="pooler.*")
# With an evaluation after the last step, which leaves whole parameters in a model under FSDP2. The clip norm is 0,
# since DeepSpeed's is of unmasked gradients.
STEPS = {"max_steps": 3, "max_grad_norm": 0.0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": tiny_rows(4)}
SAVED = {"save_strategy": "steps", "save_steps": 2}


def other_classifier(**changes: object) -> PreTrainedModel:
    """What a resumed search is given: its weights do not count."""
    model = tied_classifier(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    return model


def kept(name: str, trainer: SparseTrainer, weights_of: Callable) -> dict[str, Tensor]:
    """Weights and masks by `name/kind/parameter`."""
    found = {f"{name}/weight/{key}": one for key, one in weights_of(trainer.model).items()}
    return found | {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}


def search_early(root: Path, name: str, make: Callable[..., SparseTrainer], weights_of: Callable) -> dict[str, Tensor]:
    """An early search without final training, whose model is saved.

    Args:
        name: begins the names of what is found, and of the folder.
        make: makes a trainer of a folder, a config, and options of `tiny_trainer`.
        weights_of: whole weights of a model by canonical name.
    """
    trainer = make(root / f"{name}-early", EARLY, **STEPS, **EVALUATED)
    trainer.train()
    trainer.save_model(str(root / f"{name}-early" / "model"))
    return kept(f"{name}-early", trainer, weights_of)


def search_late(
    root: Path,
    name: str,
    make: Callable[..., SparseTrainer],
    weights_of: Callable,
    config: LotteryTicketConfig,
    **changes: object,
) -> dict[str, Tensor]:
    """A late search, and the same killed in its second round and resumed by a new trainer of other weights.

    Args:
        changes: of the model.
    """
    same = {**STEPS, **SAVED, "model": partial(tied_classifier, **changes)}
    at_two = {}
    watch = AtStep(lambda step, model, **_: step == 2 and not at_two and at_two.update(weights_of(model)))
    whole = make(root / f"{name}-late", config, **same, callbacks=[watch])
    whole.train()
    found = kept(f"{name}-late", whole, weights_of)
    found |= {f"{name}-late/at_two/{key}": one for key, one in at_two.items()}
    with pytest.raises(Crash):
        make(root / f"{name}-resumed", config, **same, callbacks=[CrashAt(3, 2)]).train()
    dist.barrier()
    resumed = make(root / f"{name}-resumed", config, **{**same, "model": partial(other_classifier, **changes)})
    resumed.train(resume_from_checkpoint=True)
    return found | kept(f"{name}-resumed", resumed, weights_of)


def check_early(folder: Path, found: dict, alone: SparseTrainer) -> None:
    """The ticket of one process, and exactly the weights that the search was given, but for zeros."""
    masks = alone.ticket.masks()
    assert sum(int((found["mask"][name] != mask).sum()) for name, mask in masks.items()) <= 2  # rounding
    start = load_file(folder / "start.safetensors")
    given = dict(tied_classifier().named_parameters())
    assert_same(start, {name: one.detach() for name, one in given.items()})
    assert_rewound(found["weight"], start, found["mask"])
    assert_same(Ticket.from_pretrained(folder / "ticket").masks(), found["mask"])
    assert_same(Ticket.from_pretrained(folder / "model").masks(), found["mask"])
    first, second = (Ticket.from_pretrained(folder / f"round-{number}" / "ticket") for number in (1, 2))
    assert not any((second.mask(name) & ~first.mask(name)).any() for name in masks)
    if all(torch.equal(found["mask"][name], mask) for name, mask in masks.items()):
        assert second.origin.base_fingerprint == alone.ticket.origin.base_fingerprint


def check_late(folder: Path, found: dict, masks: dict[str, Tensor] | None, trained: bool = True) -> None:
    """Rewound to what the dense round had come to, and trained from there under exact zeros if there was a training.

    Args:
        masks: those of one process, if they are comparable.
    """
    late = load_file(folder / "rewind.safetensors")
    for name, weight in found["at_two"].items():
        assert torch.equal(full(late, name).to(weight.dtype), weight), name
    if not trained:
        assert_rewound(found["weight"], late, found["mask"])
    for name, mask in found["mask"].items():
        assert not found["weight"][name][~mask].any(), name
        assert found["weight"][name][mask].any(), name
    differing = sum(int((found["mask"][name] != mask).sum()) for name, mask in (masks or {}).items())
    assert differing <= 2  # rounding


def assert_rewound(weights: dict[str, Tensor], start: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """The start's, with zeros where a mask prunes."""
    for name, weight in weights.items():
        expected = full(start, name)
        if name in masks:
            expected = expected.where(masks[name], torch.tensor(0.0))
        assert torch.equal(weight, expected), name


def full(tensors: dict[str, Tensor], name: str) -> Tensor:
    """By a canonical name the tensor of a file of full names."""
    return tensors[name] if name in tensors else tensors[f"bert.{name}"]
