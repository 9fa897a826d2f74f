"""S1 in a frozen weight: zeros that cost nothing per step, and the way back to the same bits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits


class BakedMask(nn.Module):
    """The zeros that are in a frozen weight now, and the values that were there.

    The mask is applied once, in place. What it removed is kept as a vector (the sparsity times the weight's size in
    memory, not saved), so that disabling or removing the adapter gives the weight back bit for bit. Both follow the
    model to another device or dtype. They are no buffers, since DDP would send those in every forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits: Tensor | None = None
        self.removed: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BakedMask":
        if self.bits is not None and self.removed is not None:
            self.bits, self.removed = fn(self.bits), fn(self.removed)
        return super()._apply(fn, recurse)

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
