"""How many entries of a stored tensor are zero? Read in blocks; nothing becomes a tensor or a model."""

import numpy as np

from sparse_hf.storage.tensor_headers import StoredTensor


BLOCK = 4 << 20  # bytes

# Of each dtype: how to read it, and the bits in which a zero has none set. Both zeros of a float count.
_MAGNITUDES = {
    **{"F64": ("<u8", 2**63 - 1), "F32": ("<u4", 2**31 - 1), "F16": ("<u2", 2**15 - 1), "BF16": ("<u2", 2**15 - 1)},
    **{"F8_E4M3": ("u1", 127), "F8_E5M2": ("u1", 127), "F8_E4M3FNUZ": ("u1", 255), "F8_E5M2FNUZ": ("u1", 255)},
    **{"I64": ("<u8", 2**64 - 1), "I32": ("<u4", 2**32 - 1), "I16": ("<u2", 2**16 - 1), "I8": ("u1", 255)},
}
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def has_countable_zeros(tensor: StoredTensor) -> bool:
    """Whether it is a matrix, or a stack of them, of numbers whose zeros are known."""
    return len(tensor.shape) >= 2 and tensor.dtype in _MAGNITUDES and tensor.length > 0


def count_zeros(tensor: StoredTensor) -> int:
    """The number of entries that are exactly zero, in memory for one block."""
    kind, magnitude = _MAGNITUDES[tensor.dtype]
    nonzero = 0
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        for first in range(0, tensor.length, BLOCK):
            block = np.frombuffer(stream.read(min(BLOCK, tensor.length - first)), dtype=kind)
            nonzero += int(np.count_nonzero(block & block.dtype.type(magnitude)))
    return tensor.length // np.dtype(kind).itemsize - nonzero


def count_ones(packed: np.ndarray) -> int:
    """The number of bits set in bytes, an array of uint8."""
    return sum(int(_ONES[packed[at : at + BLOCK]].sum(dtype=np.int64)) for at in range(0, len(packed), BLOCK))
