"""Masks as bits: eight weights per byte, for files and for memory.

Little-endian bit order: weight `i` (flat index) is bit `i % 8` of byte `i // 8`. numpy does the packing because torch
has no operation for it; neither direction allocates anything besides its result (on the CPU, for contiguous masks).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape, n weights, into ceil(n / 8) bytes.

    Returns:
        uint8, shape (ceil(n / 8),), on the mask's device; the spare bits of the last byte are zero.

    Raises:
        ValueError: `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be a bool tensor, got {mask.dtype}: pass `mask != 0`.")
    packed = np.packbits(mask.detach().reshape(-1).cpu().numpy(), bitorder="little")
    return torch.from_numpy(packed).to(mask.device)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of `shape` that `pack_bits` packed.

    Args:
        packed: uint8, shape (ceil(n / 8),) for the n weights of `shape`.
        shape: shape of the mask.

    Raises:
        ValueError: wrong dtype or length, or a spare bit is set, which means that the bytes belong to another shape.
    """
    numel = math.prod(shape)
    expected = (numel + 7) // 8
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(
            f"`packed` must be a 1-D uint8 tensor, got {packed.ndim}-D {packed.dtype}: pass what `pack_bits` returned."
        )
    if packed.numel() != expected:
        raise ValueError(
            f"`packed` must hold {expected} bytes for a mask of shape {tuple(shape)}, got {packed.numel()}: "
            "pass the shape that was packed."
        )
    if numel % 8 and int(packed[-1]) >> (numel % 8):
        raise ValueError(
            f"`packed` must have zero spare bits after the {numel} weights of shape {tuple(shape)}, "
            f"got a last byte of {int(packed[-1])}: pass the shape that was packed."
        )
    bits = np.unpackbits(packed.detach().cpu().numpy(), count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape)).to(packed.device)
