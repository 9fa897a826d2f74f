"""How important is each weight: higher scores are kept.

Every function returns a tensor of the weight's shape, on the weight's device, detached from autograd.
"""

import torch
from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """|w|, in the weight's own dtype; the criterion of lottery-ticket pruning.

    To rank by magnitude only, `keep_largest(weights, ..., absolute=True)` saves this copy.
    """
    return weight.detach().abs()


def gradient_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w * g| in fp32: the first-order Taylor estimate of how much the loss changes when the weight becomes zero.

    This is the connection sensitivity of SNIP without its normalisation to sum 1, which changes no ranking.

    Args:
        weight: any shape, any floating dtype.
        gradient: dL/dw, same shape as `weight`.

    Raises:
        ValueError: the shapes differ.
    """
    if weight.shape != gradient.shape:
        raise ValueError(
            f"`gradient` must have the shape of `weight` {tuple(weight.shape)}, got {tuple(gradient.shape)}: "
            "pass the gradient of this very weight."
        )
    # In half precision the product of two small numbers underflows to zero and everything ties.
    return (weight.detach().float() * gradient.detach().float()).abs_()


def random_scores(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform fp32 scores in [0, 1), for random pruning.

    They are drawn on the CPU and then moved, so that every device sees the same mask for the same seed.

    Args:
        weight: only its shape and device matter.
        generator: a CPU generator; its state advances.

    Raises:
        ValueError: `generator` is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ValueError(
            f"`generator` must live on the CPU, got {generator.device}: create it with `torch.Generator()` "
            "so that the mask does not depend on the device."
        )
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
