"""Which weights stay under an N:M pattern?"""

import torch
from torch import Tensor


def keep_n_of_m(scores: Tensor, n: int, m: int, *, dim: int = -1) -> Tensor:
    """Keep the `n` largest |scores| of every `m` neighbours along one dimension.

    Args:
        scores: floating, any shape; its length along `dim` is a multiple of `m`.
        n: how many stay, in 1..m.
        m: size of a group; hardware knows 2:4.
        dim: the dimension that a matrix product sums over.

    Returns:
        bool mask of the scores' shape, True = kept. Of equal scores the earlier stays.

    Raises:
        ValueError: `n` out of range, or a length that `m` does not divide.
    """
    if not 0 < n <= m:
        raise ValueError(f"N:M needs 0 < N <= M, got {n}:{m}.")
    if scores.shape[dim] % m:
        raise ValueError(
            f"A pattern {n}:{m} needs a length that is a multiple of {m}, got {scores.shape[dim]} along dimension "
            f"{dim}: leave that matrix out or choose another pattern."
        )
    groups = scores.detach().movedim(dim, -1)
    shape = groups.shape
    groups = groups.abs().reshape(-1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[:, :n], True)
    return mask.reshape(shape).movedim(-1, dim).contiguous()
