"""A mask that is in force because the weights under it are zero."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.dsee.weight_parts import WeightRun, bring_together_again, run_of, shape_of


class BakedMask(nn.Module):
    """S1 in a frozen weight, and the values that were there.

    The mask is applied once, in place. What it removed is kept as a vector (the sparsity times the weight's size in
    memory, not saved), so that disabling or removing the adapter gives the weight back bit for bit. Both follow the
    model to another device or dtype. They are no buffers, since DDP would send those in every forward pass. Where
    ranks hold parts of the weight, each keeps what was removed from its own part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits: Tensor | None = None  # of the whole weight
        self.removed: Tensor | None = None
        self.is_part = False  # what `removed` is of

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BakedMask":
        if self.bits is not None and self.removed is not None:
            self.bits, self.removed = fn(self.bits), fn(self.removed)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def bake_(self, weight: Tensor, mask: Tensor) -> None:
        """Set `weight` to zero where `mask` (bool, True = kept, whole) is False; it must be unmasked."""
        run = run_of(weight)
        held, kept = (weight.data, mask) if run is None else (run.weights, run.of(mask))
        self.bits, self.removed, self.is_part = pack_bits(mask), held[~kept], run is not None
        held.masked_fill_(~kept, 0)
        bring_together_again(weight)

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        """Put back what is missing in `weight` (or a copy of it); changes nothing where nothing is.

        Raises:
            ValueError: the weight is whole for the moment, in use under FSDP2.
        """
        if self.bits is None or self.removed is None:
            return
        run = run_of(weight)
        if run is not None:
            self._put_back(run, shape_of(weight))
            bring_together_again(weight)
        elif self.is_part:
            raise ValueError(
                "S1 changes where ranks hold parts of the weights, but FSDP2 has this one whole for the moment: call "
                "`reshard()` of the model first, or leave `reshard_after_forward` at True."
            )
        else:
            # DeepSpeed casts weights alone.
            weight.data.masked_scatter_(~self.mask(weight), self.removed.to(weight.dtype))

    @torch.no_grad()
    def unmasked(self, weight: Tensor) -> WeightRun:
        """A copy of what this rank holds of a weight that is split, as it was before the mask."""
        run = run_of(weight)
        run = WeightRun(run.start, run.weights.clone())
        if self.bits is not None and self.removed is not None:
            self._put_back(run, shape_of(weight))
        return run

    def is_filled(self, weight: Tensor) -> bool:
        """Whether a weight that was masked has other values than zeros under the mask, in this rank's part."""
        gone, run = ~self.mask(weight), run_of(weight)
        if run is None:
            return bool(weight[gone].any())
        self.keep_part(run, shape_of(weight))
        return bool(run.weights[run.of(gone)].any())

    def keep_part(self, run: WeightRun, shape: tuple[int, int]) -> None:
        """Forget what was removed from other ranks' parts of the weight, which has just been split."""
        if self.bits is None or self.removed is None or self.is_part:
            return
        gone = ~unpack_bits(self.bits, shape).view(-1)
        first = int(gone[: run.start].sum())
        self.removed = self.removed[first : first + int(run.of(gone).sum())].clone()
        self.is_part = True

    def _put_back(self, run: WeightRun, shape: tuple[int, int]) -> None:
        self.keep_part(run, shape)
        run.weights.masked_scatter_(~run.of(unpack_bits(self.bits, shape)), self.removed.to(run.weights))

    def forget(self) -> None:
        """The weight is unmasked now, or stays as it is for good."""
        self.bits = self.removed = None
        self.is_part = False

    def mask(self, weight: Tensor) -> Tensor:
        """The mask that is baked into `weight`, True = kept, whole."""
        if self.bits is None:
            return torch.ones(shape_of(weight), dtype=torch.bool, device=weight.device)
        return unpack_bits(self.bits, shape_of(weight))
