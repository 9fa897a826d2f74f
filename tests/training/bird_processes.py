"""Early-bird searches, as each of two processes makes them under FSDP2 and ZeRO, and one process alone."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.tickets.coefficients import fold_coefficients
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training.trainer import SparseTrainer
from training.tiny_early_bird import early_bird
from training.tiny_training import Crash, CrashAt, assert_same, tensors, tiny_classifier


# Five heads and 36 neurons in each of two layers: uneven for two ranks. The mask settles at step 4.
SIZES = {"hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = early_bird(heads=0.4, neurons=0.4, history=3, threshold=0.99, l1=0.05)
# Two processes with two rows each take the batches that one process with four takes. Plain descent shows gradients as
# they are; the clip norm is 0, since DeepSpeed's is taken in other places.
OPTIONS = {"max_steps": 5, "lr_scheduler_type": "constant"}
OPTIONS |= {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})}
OPTIONS |= {"max_grad_norm": 0.0, "weight_decay": 0.0, "save_strategy": "steps", "save_steps": 2}


def bird(scale: float = 1.0) -> PreTrainedModel:
    """Large weights, so that the coefficients matter; without dropout, which would differ from that of one process."""
    model = tiny_classifier(**SIZES, initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def found_of(name: str, trainer: SparseTrainer, weights_of: Callable) -> dict[str, Tensor]:
    """Weights, units, coefficients and looks by `name/kind/key`."""
    search, folder = trainer.search, Path(trainer.args.output_dir)
    coefficients = load_file(folder / "coefficients.safetensors")
    looks = {"drawn_at": torch.tensor(search.drawn_at), "steps": torch.tensor(search.steps)}
    looks["distances"] = torch.tensor(search.distances)
    kinds = {"weight": weights_of(trainer.model), "unit": trainer.ticket.units, "coefficient": coefficients}
    kinds["look"] = looks
    return {f"{name}/{kind}/{key}": one for kind, values in kinds.items() for key, one in values.items()}


def search_whole(root: Path, name: str, make: Callable[..., SparseTrainer], weights_of: Callable) -> dict[str, Tensor]:
    """A search that nobody stops.

    Args:
        name: begins the names of what is found, and of the folder.
        make: makes a trainer of a folder, a config, and options of `tiny_trainer`.
        weights_of: whole weights of a model by full name.
    """
    trainer = make(root / f"{name}-whole", CONFIG, model=bird, **OPTIONS)
    trainer.train()
    trainer.save_model(str(root / f"{name}-whole" / "model"))
    return found_of(f"{name}-whole", trainer, weights_of)


def search_killed(
    root: Path, name: str, make: Callable[..., SparseTrainer], weights_of: Callable
) -> dict[str, Tensor]:
    """The same killed in each of its trainings, and resumed by a new trainer of other weights."""
    make = partial(make, root / f"{name}-killed", CONFIG, **OPTIONS)
    with pytest.raises(Crash):
        make(model=bird, callbacks=[CrashAt(3)]).train()
    dist.barrier()
    with pytest.raises(Crash):
        make(model=partial(bird, -3.0), callbacks=[CrashAt(3, 2)]).train(resume_from_checkpoint=True)
    dist.barrier()
    resumed = make(model=partial(bird, -3.0))
    resumed.train(resume_from_checkpoint=True)
    return found_of(f"{name}-killed", resumed, weights_of)


def cut_only(
    root: Path, name: str, make: Callable[..., SparseTrainer], weights_of: Callable, **options: object
) -> dict[str, Tensor]:
    """A search without training afterwards: the smaller model as it begins, coefficients folded in."""
    config = dataclasses.replace(CONFIG, final_training=False, coefficients="fold", draw_at=2)
    trainer = make(root / f"{name}-cut", config, **{"model": bird, **OPTIONS, **options})
    trainer.train()
    return found_of(f"{name}-cut", trainer, weights_of)


def check_search(folder: Path, found: dict, alone: SparseTrainer) -> None:
    """Looks, coefficients, units and the smaller model's weights are those of one process, and so is what is saved."""
    own = load_file(Path(alone.args.output_dir) / "coefficients.safetensors")
    assert found["look"]["drawn_at"] == alone.search.drawn_at == 4
    assert found["look"]["steps"].tolist() == alone.search.steps
    assert_same(found["unit"], alone.ticket.units)
    for key, value in own.items():
        assert torch.allclose(found["coefficient"][key], value, rtol=0, atol=2e-6), key
        assert value.std() > 1e-3  # the task moved it too
    weights = tensors(alone.model)
    assert found["weight"].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found["weight"][name], weight, rtol=0, atol=2e-5), name
    assert_same(load_file(folder / "start.safetensors"), tensors(bird()))
    assert_same(StructuredTicket.from_pretrained(folder / "ticket").units, found["unit"])
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert type(saved) is type(alone.model)
    assert_same(tensors(saved), found["weight"])


def check_cut(found: dict) -> None:
    """Slices of the start, times coefficients, bit for bit."""
    smaller = cut_units(bird(), found["unit"])
    kept = {key: found["coefficient"][key][mask] for key, mask in found["unit"].items()}
    fold_coefficients(smaller, kept)
    assert_same(found["weight"], tensors(smaller))
