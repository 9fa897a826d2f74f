"""What does the log of a training tell about experts?"""

from collections.abc import Sequence

from transformers import TrainerCallback

from sparse_hf.training.dropped_tokens import DroppedTokens
from sparse_hf.training.load_balancer import LoadBalancer
from sparse_hf.training.top_k_scheduling import TopKScheduleCallback


def expert_entries(
    callbacks: Sequence[TrainerCallback], balancer: LoadBalancer | None, dropped: DroppedTokens
) -> dict[str, float]:
    """Experts per token while they change, load, losses of balance, and what full experts lose."""
    entries = {}
    for callback in callbacks:
        if isinstance(callback, TopKScheduleCallback) and callback.k_of_last_step is not None:
            entries["experts_per_token"] = float(callback.k_of_last_step)
    if balancer is not None:
        entries |= balancer.log_entries()
    return entries | dropped.log_entries()
