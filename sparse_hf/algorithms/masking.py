"""How a pruned position is made exactly zero, fast."""

import numpy as np
import torch
from torch import Tensor


# Same-width integer views: a bitwise AND with 0 gives +0.0 for every float, NaN, infinity and -0.0 included,
# where a multiplication by zero gives NaN or -0.0 (and -0.0 breaks bit comparisons and compression).
INTEGER_VIEW = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def sign_extended(mask: Tensor) -> Tensor:
    """The mask in the form `zero_pruned_` reads: int8, -1 (all bits set) where kept, 0 where pruned.

    Args:
        mask: bool, any shape, True = kept.
    """
    return mask.to(torch.int8).neg_()


@torch.no_grad()
def zero_pruned_(tensor: Tensor, bits: Tensor) -> Tensor:
    """Set the pruned positions of `tensor` to +0.0 in place and leave every other bit as it is.

    Args:
        tensor: floating point, any shape.
        bits: int8 of the same shape, from `sign_extended`; 1 byte per weight.

    Raises:
        ValueError: shapes differ, `bits` is not int8, or the dtype has no integer view of its width.
    """
    if bits.dtype != torch.int8:
        raise ValueError(f"`bits` must be int8, got {bits.dtype}. Pass `sign_extended(mask)`.")
    if tensor.shape != bits.shape:
        raise ValueError(
            f"A mask must have the shape of its tensor, got {tuple(bits.shape)} for {tuple(tensor.shape)}."
        )
    if tensor.dtype not in INTEGER_VIEW:
        choices = ", ".join(str(dtype) for dtype in INTEGER_VIEW)
        raise ValueError(f"Only floating-point weights can be masked, got {tensor.dtype}. Choose one of: {choices}.")
    integers = tensor.detach().view(INTEGER_VIEW[tensor.dtype])
    if tensor.device.type == "cpu":
        # numpy widens the mask bytes in cache-sized pieces, which torch's mixed-width AND does not.
        np.bitwise_and(integers.numpy(), bits.numpy(), out=integers.numpy())
        torch.autograd.graph.increment_version(tensor)  # autograd has to know that values changed
    else:
        integers.bitwise_and_(bits)
    return tensor
