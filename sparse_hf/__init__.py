"""Sparse training for Hugging Face Transformers: lottery tickets, pruning, sparse fine-tuning."""

import importlib


__version__ = "0.1.0"

__all__ = [
    "GradualPruningConfig",
    "LotteryTicketConfig",
    "SparseTrainer",
    "SparsityCallback",
    "StaticSparsityConfig",
    "Ticket",
    "find_sites",
    "plot_sparsity",
    "prune",
]

# Imported on first use: `import sparse_hf` alone loads neither torch nor transformers.
_HOMES = {
    "GradualPruningConfig": "sparse_hf.tickets.configs",
    "LotteryTicketConfig": "sparse_hf.tickets.configs",
    "SparseTrainer": "sparse_hf.training.trainer",
    "SparsityCallback": "sparse_hf.training.callback",
    "StaticSparsityConfig": "sparse_hf.tickets.configs",
    "Ticket": "sparse_hf.tickets.ticket",
    "find_sites": "sparse_hf.anatomy.sites",
    "plot_sparsity": "sparse_hf.hub.sparsity_picture",
    "prune": "sparse_hf.tickets.prune",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_hf' has no attribute {name!r}. It has: {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
