"""Losses that spread tokens over experts: Switch's load-balancing loss and the router z-loss.

Shapes: logits are (..., tokens, experts), counts, fractions and probabilities (..., experts), where ... are layers.
Layers are never pooled: each has its own loss. (Transformers pools them, so that layers that each collapsed onto
other experts look perfect.)
"""

from typing import Literal

import torch
from torch import Tensor


Scores = Literal["softmax", "sigmoid"]


def token_probabilities(logits: Tensor, scores: Scores) -> Tensor:
    """Each token's probabilities over the experts, float32, of the same shape; rows sum to 1.

    Args:
        scores: `"softmax"`: the softmax of the logits. `"sigmoid"`: sigmoids divided by their sum over all experts, as
            DeepSeek-V3 normalises them for its own balance loss.
    """
    logits = logits.float()
    if scores == "softmax":
        return logits.softmax(dim=-1)
    affinities = logits.sigmoid()
    return affinities / affinities.sum(dim=-1, keepdim=True)


def probability_sums(logits: Tensor, counted: Tensor, scores: Scores) -> Tensor:
    """The sum of `token_probabilities` over the counted tokens, float32 (..., experts); differentiable.

    Divided by the number of these tokens it is P of `switch_loss`; sums of several batches may be added first.

    Args:
        counted: bool (tokens,), False for padding.
    """
    return torch.where(counted[:, None], token_probabilities(logits, scores), 0.0).sum(dim=-2)


def chosen_counts(chosen: Tensor, counted: Tensor, experts: int) -> Tensor:
    """How many counted tokens chose each expert, int64 (experts,); the device is not synchronised.

    Args:
        chosen: numbers of experts, integer (tokens, top_k).
        counted: bool (tokens,), False for padding.
    """
    weights = counted[:, None].expand_as(chosen).to(torch.int64)
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen.reshape(-1).to(torch.int64), weights.reshape(-1))


def chosen_fractions(counts: Tensor) -> Tensor:
    """f of `switch_loss`: each expert's part of all choices, float32 of the same shape; sums to 1 for every top_k."""
    return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)).float()


def switch_loss(fractions: Tensor, probabilities: Tensor) -> Tensor:
    """experts * sum_i f_i P_i per layer (Switch Transformer, Fedus et al. 2021), without the coefficient.

    1 where load is even, `experts / top_k` where all tokens want and choose the same top_k experts. 1 is no lower
    bound of a sample. Transformers lets f sum to top_k, so its value is top_k times this one. Linear in both: what
    several batches have in common are their fractions, what they add up are their probabilities.

    Args:
        fractions: (..., experts), without gradient, see `chosen_fractions`.
        probabilities: (..., experts), the mean of the tokens' probabilities.
    """
    return fractions.shape[-1] * (fractions.detach() * probabilities).sum(dim=-1)


def z_loss_sums(logits: Tensor, counted: Tensor) -> Tensor:
    """The sum over counted tokens of logsumexp(logits)^2, float32 (...,); ST-MoE's router z-loss is its mean.

    It keeps logits small: a logit's gradient is 2 logsumexp times its probability, divided by the tokens.
    """
    return torch.where(counted, logits.float().logsumexp(dim=-1).square(), 0.0).sum(dim=-1)
