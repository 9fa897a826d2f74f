"""A matrix as a low-rank part plus a few large entries; DSEE takes the positions of these for its sparse update."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_hf.algorithms.supports import check_cpu_generator, largest_support


# Enough that seeds agree on nearly all of the support, also on a Gaussian matrix, which has no structure to find:
# its test asks for it, and with 2 steps and 4 directions they share only half.
POWER_STEPS = 20
EXTRA_DIRECTIONS = 32


class SparseLowRank(NamedTuple):
    """weight ~= u @ v + S, where S has `values` at `support` and is zero elsewhere.

    Attributes:
        support: int64 `[nnz]`, strictly increasing flat indices into the weight read row by row.
        values: `[nnz]`, what the low-rank part leaves of the weight there.
        u: `[rows, rank]`, orthonormal columns.
        v: `[rank, columns]`.
    """

    support: Tensor
    values: Tensor
    u: Tensor
    v: Tensor


@torch.no_grad()
def sparse_low_rank(
    weight: Tensor, nnz: int, rank: int, *, generator: torch.Generator, iterations: int = 10
) -> SparseLowRank:
    """Split a matrix into a low-rank part and exactly `nnz` entries that this part explains worst.

    First the best low-rank part of the weight alone is found by power steps with QR. Then the two parts alternate:
    S takes the `nnz` entries of largest |weight - u v|, and u v takes another power step on weight - S. The number of
    entries is the constraint, as in GoDec, so that S always has as many as asked: where weight - u v has fewer
    non-zeros, the lowest flat indices fill up.

    DSEE's released code (GreBsmo) differs. Its S is every entry above 0.01, whatever the scale of the weight: a fifth
    of a 768 x 768 Gaussian matrix with deviation 0.04, nearly all of one with deviation 1; where S has fewer than
    `nnz` entries, the support becomes the whole matrix. It raises the rank by 5 in each of 100 outer iterations,
    to 496, though it uses nothing but positions in S. What such a rank leaves is largely noise: on that first matrix
    two seeds share less than a third of 64 positions. Here the rank is that of the adapter, the count is exact,
    and neither the scale nor, by much, the seed matters. For the last, the power steps come first:
    with S in from the start, entries that a random first guess explains badly keep their places.

    Computed on the CPU, so that all devices share the generator's draws. Another torch build or number of threads
    rounds differently, which may change entries at the margin: store the support, do not recompute it.

    Args:
        weight: floating `[rows, columns]`; fp16 and bf16 are computed in fp32.
        nnz: entries of S, in 0..numel.
        rank: of the low-rank part, at least 0 (then S is top-|weight|); more than the weight's smaller side counts as
            that side, and then S is chosen by rounding errors.
        generator: a CPU generator for the first guess; its state advances.
        iterations: rounds of alternation, at least 1.

    Returns:
        the parts in fp32 (fp64 for an fp64 weight) on the weight's device.

    Raises:
        ValueError: the weight is not a finite floating matrix, or `nnz`, `rank` or `iterations` is out of range.
    """
    _check(weight, rank, iterations)
    check_cpu_generator(generator)
    matrix = weight.detach().cpu().contiguous()
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    scale = _power_of_two(matrix)
    matrix = matrix / scale
    rank = min(rank, *matrix.shape)
    rows = torch.randn(min(rank + EXTRA_DIRECTIONS, *matrix.shape), matrix.shape[1], generator=generator).to(matrix)
    for _ in range(POWER_STEPS):
        rows = _power_step(matrix, rows)[1]
    without_sparse = matrix.clone()
    for _ in range(iterations):
        columns, rows = _power_step(without_sparse, rows)
        u, v = _leading(columns, rows, rank)
        residual = torch.addmm(matrix, u, v, alpha=-1)
        support = largest_support(residual, nnz)
        without_sparse.copy_(matrix).view(-1)[support] -= residual.view(-1)[support]
    values = residual.view(-1)[support]
    return SparseLowRank(*(part.to(weight.device) for part in (support, values * scale, u, v * scale)))


def _power_step(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the `rows` towards the leading right singular vectors; columns @ rows is the matrix projected on them."""
    columns = torch.linalg.qr(matrix @ rows.T).Q
    return columns, columns.T @ matrix


def _leading(columns: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of columns @ rows with this rank; `columns` are orthonormal."""
    directions = torch.linalg.eigh(rows @ rows.T).eigenvectors  # eigenvalues ascend
    directions = directions[:, directions.shape[1] - rank :]
    return columns @ directions, directions.T @ rows


def _power_of_two(matrix: Tensor) -> float:
    """About the largest magnitude: divided by it, squares neither overflow nor vanish, and no bit is rounded."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return math.ldexp(1.0, max(-126, min(126, exponent)))  # normal in fp32, and so is its inverse


def _check(weight: Tensor, rank: int, iterations: int) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"`weight` must be a floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}: "
            "dequantize it or reshape it to 2-D."
        )
    if not weight.isfinite().all():
        count = int((~weight.isfinite()).sum())
        raise ValueError(f"`weight` must be finite, got {count} NaN or infinite values: repair the checkpoint.")
    if rank < 0:
        raise ValueError(f"`rank` must be at least 0, got {rank}: take that of the adapter.")
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}: 10 are usually enough.")
