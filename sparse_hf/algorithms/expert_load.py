"""How evenly are tokens spread over experts, and what of it is chance?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


DEAD_BELOW = 0.05  # of a fair share


@dataclass(frozen=True)
class ExpertLoad:
    """Metrics of each layer, float64 tensors of shape (layers,).

    Attributes:
        max_violation: the fullest expert's load over the mean load, minus 1 (MaxVio); 0 is even, experts / top_k - 1
            is a collapse.
        variation: standard deviation over mean (CV), 0 is even.
        entropy: of the load, divided by ln(experts): 1 is even, 0 one expert for all.
        min_share: the emptiest expert's part of a fair share, 0 to 1.
        dead: number of experts with less than 5 % of a fair share.
    """

    max_violation: Tensor
    variation: Tensor
    entropy: Tensor
    min_share: Tensor
    dead: Tensor


def expert_load(counts: Tensor) -> ExpertLoad:
    """Metrics of how often each expert was chosen.

    Args:
        counts: (layers, experts), at least one choice per layer and two experts.
    """
    counts = counts.double()
    shares = counts / counts.mean(dim=-1, keepdim=True)  # of a fair share
    part = counts / counts.sum(dim=-1, keepdim=True)
    return ExpertLoad(
        max_violation=shares.amax(dim=-1) - 1,
        variation=shares.std(dim=-1, correction=0),
        entropy=torch.special.entr(part).sum(dim=-1) / math.log(counts.shape[-1]),
        min_share=shares.amin(dim=-1),
        dead=(shares < DEAD_BELOW).sum(dim=-1).double(),
    )


def variation_by_chance(experts: int, top_k: int, tokens: int) -> float:
    """CV that a router shows which draws top_k of the experts evenly at random for each token: the noise floor.

    sqrt((experts - top_k) / (top_k * tokens)). A measured CV near it is as even as this number of tokens can tell.

    Args:
        tokens: counted tokens of the batch, 1 or more.
    """
    return math.sqrt((experts - top_k) / (top_k * tokens))
