"""Have hidden states or experts become alike? Ranks of representations, and similarities of experts."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


CHUNK = 2**22  # values that are converted at a time


class Spread:
    """Mean and covariance of rows that come in batches, in float64; memory hidden x hidden, however many rows.

    Rows are shifted by the mean of the first batch before their products are taken, so that a large common part, which
    hidden states have, costs no precision.

    Attributes:
        rows: how many were added.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._shift: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, batch: Tensor) -> None:
        """Add rows, (rows, hidden) of any float dtype; none are fine."""
        if not len(batch):
            return
        batch = batch.float()
        if self._shift is None:
            self._shift = batch.mean(dim=0)
        batch = batch - self._shift
        self.rows += len(batch)
        self._sum = self._sum + batch.sum(dim=0).double()
        self._products = self._products + (batch.T @ batch).double()

    def covariance(self) -> Tensor:
        """Of the rows so far, divided by their number, float64 (hidden, hidden).

        Raises:
            ValueError: there are no rows.
        """
        if not self.rows:
            raise ValueError("A covariance needs at least one row, got none.")
        mean = self._sum / self.rows
        return self._products / self.rows - torch.outer(mean, mean)


def effective_rank(covariance: Tensor) -> float:
    """How many directions do the rows use? exp of the entropy of their singular values, divided by their sum.

    1 where all rows lie on a line through their mean, hidden where they spread evenly in all directions; less than 1
    means nothing, so equal rows, which have no direction, give 1. Singular values are those of the centred rows, the
    roots of the covariance's eigenvalues. With rows - 1 < hidden it cannot exceed rows - 1: compare at equal numbers.

    Args:
        covariance: (hidden, hidden), symmetric, such as `Spread.covariance()`.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    # What is this small beside the largest is rounding, of float32 products at least.
    kept = eigenvalues[eigenvalues > 1e-7 * eigenvalues[-1]]
    values = kept.clamp(min=0).sqrt()
    if not len(values) or float(values.sum()) == 0:
        return 1.0
    return math.exp(float(torch.special.entr(values / values.sum()).sum()))


def weight_similarity(stacks: Iterable[Tensor]) -> Tensor:
    """Cosine between any two experts' weights, all matrices of an expert taken as one vector.

    1 for copies, about 0 for experts drawn independently. Experts that differ by the order of their neurons alone
    compute the same, but are not similar here.

    Args:
        stacks: tensors (experts, ...), of which row e belongs to expert e. They are read in blocks of a few MiB.

    Returns:
        float64 (experts, experts); a row of zeros for an expert whose weights are all zero.
    """
    products: Tensor | float = 0.0
    for stack in stacks:
        flat = stack.detach().reshape(len(stack), -1)
        for part in flat.split(max(1, CHUNK // len(stack)), dim=1):
            part = part.float()
            products = products + (part @ part.T).double()
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms[None, :]).clamp(min=torch.finfo(torch.float64).tiny)


def output_similarity(outputs: Tensor) -> Tensor:
    """Cosine between what any two experts make of the same token, the mean over tokens.

    Args:
        outputs: (experts, tokens, hidden), at least one token.

    Returns:
        float64 (experts, experts); an output of zeros has cosine 0 with all.
    """
    directions = torch.nn.functional.normalize(outputs.float(), dim=-1)
    return torch.einsum("ith,jth->ij", directions, directions).double() / outputs.shape[1]


def mean_off_diagonal(similarity: Tensor) -> Tensor:
    """Mean similarity of two different experts, (...) of (..., experts, experts); nan for a single expert."""
    experts = similarity.shape[-1]
    others = similarity.sum(dim=(-2, -1)) - similarity.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return others / (experts * (experts - 1)) if experts > 1 else others * math.nan
