"""What a selection refuses, before it looks at scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(scores: Sequence[Tensor], candidates: Sequence[Tensor] | None, min_per_tensor: int) -> None:
    """Raise ValueError unless `scores` are floating and `candidates` are masks of them."""
    for position, score in enumerate(scores):
        if not score.is_floating_point():
            raise ValueError(
                f"`scores` must be floating, got {score.dtype} at position {position}: pass `score.float()`."
            )
    if min_per_tensor < 0:
        raise ValueError(f"`min_per_tensor` must be at least 0, got {min_per_tensor}: 0 switches the minimum off.")
    if candidates is None:
        return
    if len(candidates) != len(scores):
        raise ValueError(
            f"`candidates` must match `scores`, got {len(candidates)} for {len(scores)}: pass one per tensor."
        )
    for position, (score, allowed) in enumerate(zip(scores, candidates, strict=True)):
        if allowed.dtype != torch.bool or allowed.shape != score.shape or allowed.device != score.device:
            raise ValueError(
                f"`candidates` must be bool of shape {tuple(score.shape)} on {score.device}, got {allowed.dtype} of "
                f"shape {tuple(allowed.shape)} on {allowed.device} at position {position}: pass their masks."
            )


def check_count(num_keep: int, num_candidates: int, minimum: int, min_per_tensor: int) -> None:
    """Raise ValueError unless so many can be kept; the numbers are of all tensors on all ranks."""
    if not 0 <= num_keep <= num_candidates:
        raise ValueError(
            f"`num_keep` must be in 0..{num_candidates}, the number of candidates, got {num_keep}: "
            "masks that are nested in earlier ones can only lose weights."
        )
    if num_keep < minimum:
        raise ValueError(
            f"`num_keep` must be at least {minimum} to keep `min_per_tensor={min_per_tensor}` in every tensor, "
            f"got {num_keep}: lower the sparsity or pass `min_per_tensor=0`."
        )
