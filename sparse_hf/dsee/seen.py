"""Was a tensor replaced or written to since it was looked at?"""

from typing import NamedTuple

from torch import Tensor


class Seen(NamedTuple):
    """A tensor as it was looked at. It is held, since the memory of a freed one may hold another soon."""

    tensor: Tensor
    version: int  # rises when the tensor is written to; inference tensors have none

    @staticmethod
    def of(tensor: Tensor) -> "Seen":
        """Look at a tensor."""
        return Seen(tensor, _version(tensor))

    def still(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is this one, unwritten since."""
        return tensor is not None and tensor is self.tensor and _version(tensor) == self.version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
