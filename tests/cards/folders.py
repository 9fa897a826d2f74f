"""Folders as they come: tiny models, tickets and adapters, saved."""

from pathlib import Path

from sparse_hf import EarlyBirdConfig, StructuredTicket, prune, slim
from sparse_hf.cli.model_folder import save_sparse
from tiny_models import tiny_model


def classifier():
    return tiny_model("bert", "sequence_classification")


def save_sparse_model(folder: Path, sparsity: float = 0.5) -> Path:
    model = classifier()
    save_sparse(model, None, prune(model, sparsity, budget="uniform"), folder)
    return folder


def save_ticket(folder: Path) -> Path:
    return prune(classifier(), 0.5, budget="uniform").save_pretrained(folder)


def half_of_the_units() -> StructuredTicket:
    return StructuredTicket.from_model(classifier(), EarlyBirdConfig(heads=0.5, neurons=0.25))


def save_structured_ticket(folder: Path) -> Path:
    return half_of_the_units().save_pretrained(folder)


def save_slim_model(folder: Path) -> Path:
    slim(classifier(), half_of_the_units()).save_pretrained(folder)
    return folder


def save_zeros(folder: Path) -> Path:
    """A pruned model without its masks."""
    model = classifier()
    prune(model, 0.5, budget="uniform")
    model.save_pretrained(folder)
    return folder


def save_mixture(folder: Path) -> Path:
    tiny_model("mixtral", "causal_lm").save_pretrained(folder)
    return folder
