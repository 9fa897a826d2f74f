"""What spreads tokens over experts: Switch's load-balancing loss and its kin, the router z-loss, DeepSeek's bias.

Shapes: logits are (..., tokens, experts), counts, fractions and probabilities (..., experts), where ... are layers.
Layers are never pooled: each has its own loss. (Transformers pools them, so that layers that each collapsed onto
other experts look perfect.)
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn


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
    """How many counted tokens chose each expert, int64 (..., experts); the device is not synchronised.

    Args:
        chosen: numbers of experts, integer (..., tokens, top_k).
        counted: bool (tokens,), False for padding.
    """
    return chosen_counts_by_sequence(chosen, counted, experts, torch.zeros_like(counted, dtype=torch.int64), 1)[
        ..., 0, :
    ]


def chosen_counts_by_sequence(
    chosen: Tensor, counted: Tensor, experts: int, sequence: Tensor, sequences: int
) -> Tensor:
    """The same for the tokens of each sequence alone, int64 (..., sequences, experts).

    Args:
        sequence: of which sequence each token is, int64 (tokens,), from 0 to `sequences` - 1.
    """
    places = sequence[:, None] * experts + chosen  # (..., tokens, top_k)
    weights = counted[:, None].expand_as(places).to(torch.int64)
    counts = weights.new_zeros((*chosen.shape[:-2], sequences * experts))
    return counts.scatter_add_(-1, places.flatten(-2), weights.flatten(-2)).unflatten(-1, (sequences, experts))


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


def sequence_loss_sums(probabilities: Tensor, counts: Tensor, sequence: Tensor, top_k: int) -> Tensor:
    """The sum over sequences of `switch_loss` within each, float32 (...,): the sequence-wise loss of DeepSeek-V3.

    Divided by the number of sequences it is 1 where load is even within each, however many tokens they have. Load
    that is even over a batch of sequences, each of which uses other experts, is not even here.

    Args:
        probabilities: (..., tokens, experts), 0 for padding.
        counts: (..., sequences, experts), see `chosen_counts_by_sequence`; a sequence without choices adds nothing.
        sequence: of which sequence each token is, int64 (tokens,).
        top_k: experts per token.
    """
    choices = counts.sum(dim=-1, keepdim=True).clamp(min=1).double()
    # P of a sequence is the mean over its tokens, of which there are choices / top_k.
    weights = (counts.shape[-1] * counts / choices * top_k / choices).to(probabilities.dtype)
    return (probabilities * weights.index_select(-2, sequence)).sum(dim=(-2, -1))


def device_sums(values: Tensor, groups: int) -> Tensor:
    """(..., experts) added up over the experts of each device, (..., groups): the first experts / groups, and so on.

    `switch_loss` of fractions and probabilities summed so is DeepSeek-V2's device-level balance loss: 1 where devices
    have even load, whatever experts have within them.
    """
    return values.unflatten(-1, (groups, -1)).sum(dim=-1)


def entropy_sums(logits: Tensor, counted: Tensor, scores: Scores) -> Tensor:
    """The sum over counted tokens of the entropy of `token_probabilities`, divided by ln(experts), float32 (...,).

    The mean over tokens is 1 where every token likes all experts the same, 0 where each wants a single one. It says
    nothing of load.
    """
    logs = logits.float() if scores == "softmax" else nn.functional.logsigmoid(logits.float())
    logs = logs.log_softmax(dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1) / math.log(logits.shape[-1])
    return torch.where(counted, entropy, 0.0).sum(dim=-1)


def bias_directions(counts: Tensor) -> Tensor:
    """sign(mean load - load) of each expert, -1, 0 or 1, int64 (..., experts).

    Times a rate it is what auxiliary-loss-free balancing (DeepSeek) adds to the bias of the choice after a step.
    Exact: integers are compared.
    """
    return (counts.sum(dim=-1, keepdim=True) - counts.shape[-1] * counts).sign()
