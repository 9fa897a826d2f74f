"""Has the mask settled? The early-bird test on the masks of units, and how far apart these masks are."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_hf.algorithms.mask_distance import hamming_distance


def unit_mask_distance(masks_a: Mapping[str, Tensor], masks_b: Mapping[str, Tensor]) -> float:
    """The share of units on which two masks disagree, for the kind of units that disagree most.

    The kind is what follows the last dot of a key, as in "encoder.layer.0.heads" and "encoder.layer.0.neurons". Each
    kind is normalised by itself, over all layers, since BERT's neurons outnumber its heads 256 to 1 and would drown
    them. Early-Bird Tickets has one kind (channels) and takes the plain normalised Hamming distance.

    Args:
        masks_a: bool tensors by key, True = kept.
        masks_b: bool tensors of the same keys and shapes.

    Returns:
        0.0 (same masks) to 1.0 (complements in at least one kind); 0.0 when there are no units at all.

    Raises:
        ValueError: keys, shapes or dtypes do not match.
    """
    if masks_a.keys() != masks_b.keys():
        raise ValueError(
            f"Both masks must have the same keys, got {sorted(masks_a.keys() ^ masks_b.keys())} in only one of them: "
            "compare masks of the same model."
        )
    kinds: dict[str, list[str]] = {}
    for key in masks_a:
        kinds.setdefault(key.rpartition(".")[2], []).append(key)
    distances = [hamming_distance([masks_a[k] for k in keys], [masks_b[k] for k in keys]) for keys in kinds.values()]
    return max(distances, default=0.0)


def distance_matrix(masks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """`unit_mask_distance` of every pair, the heat map of the early-bird papers.

    Args:
        masks: the masks drawn at n moments, all of the same keys and shapes.

    Returns:
        fp64 of shape (n, n), symmetric, zeros on the diagonal.

    Raises:
        ValueError: masks do not match.
    """
    matrix = torch.zeros(len(masks), len(masks), dtype=torch.float64)
    for row, mask in enumerate(masks):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = unit_mask_distance(mask, masks[column])
    return matrix


class MaskHistory:
    """The last masks of a search, and whether they still change: the early-bird test.

    The mask has settled when `length` masks have been drawn and the newest one is within `threshold` of each of the
    others (Early-Bird Tickets: 5 and 0.1; released EarlyBERT draws at a fixed step and has no such test). Masks drawn
    before the coefficients have moved are alike by their ties and settle falsely: do not add them.

    `entries` holds (step, masks), oldest first. Save it to continue later, and feed it to `add` one by one.
    """

    def __init__(self, length: int = 5, threshold: float = 0.1) -> None:
        """An empty history.

        Args:
            length: how many masks must agree, at least 2.
            threshold: largest distance at which two masks agree, in [0, 1).

        Raises:
            ValueError: a number is out of its range.
        """
        if length < 2:
            raise ValueError(f"`length` must be at least 2, got {length}: the newest mask is compared to older ones.")
        if not 0 <= threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {threshold}: 0.1 lets 10 % of the units differ.")
        self.length = length
        self.threshold = threshold
        self.entries: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, masks: Mapping[str, Tensor]) -> None:
        """Append a copy (on the CPU) of the mask drawn at `step`, and forget the oldest beyond `length`.

        Raises:
            ValueError: `step` is not after the last one's.
        """
        if self.entries and step <= self.entries[-1][0]:
            raise ValueError(
                f"`step` must be after the last one, {self.entries[-1][0]}, got {step}: "
                "add each mask once, and `clear` before a new search."
            )
        copies = {key: mask.detach().to("cpu", copy=True) for key, mask in masks.items()}
        self.entries = [*self.entries, (step, copies)][-self.length :]

    def clear(self) -> None:
        """Forget all masks."""
        self.entries = []

    @property
    def largest_distance(self) -> float | None:
        """From the newest mask to any of the others; None until there are `length` masks."""
        if len(self.entries) < self.length:
            return None
        *others, newest = [masks for _, masks in self.entries]
        return max(unit_mask_distance(newest, other) for other in others)

    @property
    def settled(self) -> bool:
        """Whether there are `length` masks and the newest is within `threshold` of each of the others."""
        largest = self.largest_distance
        return largest is not None and largest <= self.threshold
