"""How alike are two sets of masks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hamming_distance(masks_a: Sequence[Tensor], masks_b: Sequence[Tensor]) -> float:
    """The fraction of weights on which two sets of masks disagree: the mask distance of Early-Bird Tickets.

    Args:
        masks_a: bool tensors, True = kept.
        masks_b: the same number of bool tensors with the same shapes.

    Returns:
        0.0 (same masks) to 1.0 (complements); 0.0 when there are no weights at all.

    Raises:
        ValueError: the two sets do not match.
    """
    _check_pairs(masks_a, masks_b)
    numel = sum(mask.numel() for mask in masks_a)
    differing = sum(_count(a ^ b) for a, b in zip(masks_a, masks_b, strict=True))
    return differing / numel if numel else 0.0


def overlap(masks_a: Sequence[Tensor], masks_b: Sequence[Tensor]) -> float:
    """|A ∩ B| / |A ∪ B| of the kept weights, as BERT-Tickets compares the tickets of two tasks.

    Args:
        masks_a: bool tensors, True = kept.
        masks_b: the same number of bool tensors with the same shapes.

    Returns:
        0.0 (nothing in common) to 1.0 (same masks, also when both keep nothing).

    Raises:
        ValueError: the two sets do not match.
    """
    _check_pairs(masks_a, masks_b)
    common = sum(_count(a & b) for a, b in zip(masks_a, masks_b, strict=True))
    union = sum(_count(a | b) for a, b in zip(masks_a, masks_b, strict=True))
    return common / union if union else 1.0


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def _check_pairs(masks_a: Sequence[Tensor], masks_b: Sequence[Tensor]) -> None:
    if len(masks_a) != len(masks_b):
        raise ValueError(
            f"Both sets must hold the same number of masks, got {len(masks_a)} and {len(masks_b)}: "
            "compare tickets of the same model."
        )
    for position, (a, b) in enumerate(zip(masks_a, masks_b, strict=True)):
        if a.dtype != torch.bool or b.dtype != torch.bool:
            raise ValueError(
                f"Masks must be bool, got {a.dtype} and {b.dtype} at position {position}: pass `mask != 0`."
            )
        if a.shape != b.shape:
            raise ValueError(
                f"Masks must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)} at position {position}: "
                "compare tickets of the same model, in the same order."
            )
