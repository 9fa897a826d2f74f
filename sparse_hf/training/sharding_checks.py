"""Which combinations with sharded parameters would go wrong, found before training?"""

from torch import nn

from sparse_hf.algorithms.sharded_tensors import is_sharded
from sparse_hf.algorithms.zero_partitions import is_partitioned
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.ticket import Ticket


def check_score(sparsity: StaticSparsityConfig | GradualPruningConfig | Ticket, model: nn.Module) -> None:
    """Raise ValueError if masks are to be drawn by gradients that ZeRO has consumed or never makes whole."""
    if getattr(sparsity, "score", None) == "gradient" and any(map(is_partitioned, model.parameters())):
        raise ValueError(
            "score='gradient' reads gradients, which DeepSpeed does not leave behind: use score='magnitude', or draw "
            "the ticket without DeepSpeed and train under it."
        )


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if ranks hold parts of the model's parameters, where `what` reads or writes whole ones."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(f"{what} works on whole parameters only, got FSDP or DeepSpeed: use one process or DDP.")
