"""S1 in a frozen weight: zeros that cost nothing per step, and the way back to the same bits."""

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits


class BakedMask(nn.Module):
    """The zeros that are in a frozen weight now, and the values that were there.

    The mask is applied once, in place. What it removed is kept as a vector (the sparsity times the weight's size in
    memory, not saved), so that disabling or removing the adapter gives the weight back bit for bit. Both follow the
    model to another device or dtype.
    """

    bits: Tensor | None
    removed: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", None, persistent=False)
        self.register_buffer("removed", None, persistent=False)

    @torch.no_grad()
    def bake_(self, weight: Tensor, mask: Tensor) -> None:
        """Set `weight` to zero where `mask` (bool, True = kept) is False; it must be unmasked."""
        self.bits, self.removed = pack_bits(mask), weight[~mask]
        weight.masked_fill_(~mask, 0)

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        """Put back what is missing in `weight` (or a copy of it); changes nothing where nothing is."""
        if self.bits is not None and self.removed is not None:
            weight.masked_scatter_(~self.mask(weight), self.removed)

    def forget(self) -> None:
        """The weight is unmasked now, or stays as it is for good."""
        self.bits = self.removed = None

    def mask(self, weight: Tensor) -> Tensor:
        """The mask that is baked into `weight`, True = kept."""
        if self.bits is None:
            return torch.ones_like(weight, dtype=torch.bool)
        return unpack_bits(self.bits, tuple(weight.shape))
