"""How much does the chosen expert tell about a token's class, and what of it is chance?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Specialisation:
    """What choices tell about classes, in bits.

    Attributes:
        information: of each layer, float64 (layers,): 0 where every class uses experts alike.
        by_chance: of each layer, float64 (layers,): what an evenly random router shows with as many tokens; see
            `information_by_chance`.
        class_entropy: what there is to know: the entropy of the classes among the tokens.
    """

    information: Tensor
    by_chance: Tensor
    class_entropy: float


def specialisation(counts: Tensor, top_k: int) -> Specialisation:
    """Mutual information between the class of a token and an expert that it chose.

    Args:
        counts: of choices, (classes, layers, experts); every layer has as many.
        top_k: choices per token.

    Raises:
        ValueError: nothing was counted.
    """
    counts = counts.double()
    if counts.shape[1] == 0 or float(counts[:, 0].sum()) == 0:
        raise ValueError("Specialisation needs at least one counted token in a layer, got none.")
    seen = int((counts[:, 0].sum(dim=-1) > 0).sum())
    choices = int(counts[:, 0].sum())
    chance = information_by_chance(seen, counts.shape[-1], top_k, choices // top_k)
    information = mutual_information(counts)
    classes = _entropy(counts[:, 0].sum(dim=-1) / choices, (0,))
    return Specialisation(information, torch.full_like(information, chance), float(classes))


def mutual_information(counts: Tensor) -> Tensor:
    """In bits, float64 (layers,), of counts (classes, layers, experts): H(class) + H(expert) - H(class, expert)."""
    joint = counts.double() / counts.double().sum(dim=(0, 2), keepdim=True)
    classes, experts = joint.sum(dim=2), joint.sum(dim=0)
    information = _entropy(classes, (0,)) + _entropy(experts, (1,)) - _entropy(joint, (0, 2))
    return information.clamp(min=0)  # rounding


def information_by_chance(classes: int, experts: int, top_k: int, tokens: int) -> float:
    """Mean mutual information in bits that a router shows which draws top_k experts evenly at random: the noise floor.

    (classes - 1) (experts - top_k) / (2 ln 2 top_k tokens), for tokens many enough that every cell has some. It takes
    tokens to be independent; those of one text are not, so with few texts per class chance gives more.

    Args:
        classes: that have tokens.
        tokens: counted tokens, 1 or more.
    """
    return (classes - 1) * (experts - top_k) / (2 * math.log(2) * top_k * tokens)


def _entropy(parts: Tensor, over: tuple[int, ...]) -> Tensor:
    return torch.special.entr(parts).sum(dim=over) / math.log(2)
