"""How is a tensor without its zeros laid out? Its head says it all, and is not believed without checks.

A stored tensor is uint8 and 1-D: a head, the kept values, the code of where they go; each part ends at a multiple of
8 bytes. Values may be coded by zstd; then the head ends with the lengths of their byte planes. All lengths follow from
the head, so a file that claims more than it holds is refused before anything is allocated.
"""

import math
import reprlib
import struct
from dataclasses import dataclass

import numpy as np

from sparse_hf.algorithms import elias_fano, n_of_4_codec
from sparse_hf.algorithms.n_of_4_codec import kept_of_4
from sparse_hf.storage.tensor_headers import DTYPE_BITS, MOST_DIMENSIONS
from sparse_hf.storage.value_coding import why_not


MAGIC = b"sparsehf"
# Magic, form, dtype, number of dimensions, kept values; then 8 bytes per dimension.
HEAD = struct.Struct("<8s16s16sQQ")
ZSTD = "+zstd"  # behind the form: values are coded; then 8 bytes per byte of an element, the lengths of their planes
LONGEST_HEAD = HEAD.size + 8 * MOST_DIMENSIONS + 8 * 8
ELEMENTS = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}  # bits -> looked at as

# "plain" keeps everything: a 1-D uint8 tensor, which a reader could not tell from a stored one, is stored so, and what
# only becomes smaller by zstd.
FORMS = ("bitmask", "n_of_4", "elias_fano", "plain")


@dataclass(frozen=True)
class StoredForm:
    """How a tensor is stored.

    Attributes:
        form: "bitmask", "n_of_4", "elias_fano", "plain", or "dense" for a tensor that is stored as it is.
        dtype: of the tensor itself, as safetensors spells it.
        shape: of the tensor itself.
        nonzeros: elements kept; None for "dense" and "plain", where nobody counted.
        length: bytes on disk.
        planes: bytes of each byte plane of the values, if these are coded by zstd.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    nonzeros: int | None
    length: int
    planes: tuple[int, ...] = ()

    @property
    def full_name(self) -> str:
        """The form, and how values are coded."""
        return self.form + (ZSTD if self.planes else "")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """What the tensor takes with its zeros."""
        return self.size * DTYPE_BITS[self.dtype] // 8


def read_form(head: bytes, length: int, most_elements: int | None = None) -> StoredForm:
    """What a stored tensor is, from its first `LONGEST_HEAD` bytes, or all if it has fewer.

    Args:
        length: of the whole stored tensor.
        most_elements: as in `expand_tensor`.

    Raises:
        ValueError: it cannot be a tensor of ours of that length.
    """
    if len(head) < HEAD.size:
        raise damaged(f"{len(head)} bytes are too few")
    magic, form, dtype, dimensions, count = HEAD.unpack_from(head)
    form, dtype = (text.rstrip(b"\0").decode("latin-1") for text in (form, dtype))
    if magic != MAGIC:
        raise damaged(f"it begins with {magic!r} instead of {MAGIC!r}")
    form, zstd, rest = form.partition(ZSTD)
    if form not in FORMS or rest:
        raise damaged(f"its form must be one of {', '.join(FORMS)}, got {form + zstd + rest!r}")
    if DTYPE_BITS.get(dtype) not in ELEMENTS:
        raise damaged(f"its dtype is {dtype!r}")
    width = DTYPE_BITS[dtype] // 8 if zstd else 0
    if dimensions > MOST_DIMENSIONS or len(head) < HEAD.size + 8 * (dimensions + width):
        raise damaged(f"it cannot have {dimensions} dimensions")
    shape = struct.unpack_from(f"<{dimensions}Q", head, HEAD.size)
    planes = struct.unpack_from(f"<{width}Q", head, HEAD.size + 8 * dimensions)
    size = math.prod(shape)
    if size >= 2**48 or (most_elements is not None and size > most_elements):
        raise damaged(f"a shape of {reprlib.repr(list(shape))} is larger than any that belongs here")
    problem = _count_problem(form, dtype, shape, count, coded=bool(zstd)) or why_not(planes, count)
    if problem:
        raise damaged(problem)
    found = StoredForm(form, dtype, shape, None if form == "plain" else count, length, planes)
    if _padded(places(found)[2] + code_bytes(form, size, count)) != length:
        raise damaged(f"{form} of {dtype} {list(shape)} with {count} values cannot take {length} bytes")
    return found


def is_stored_like(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor in a compressed checkpoint is in one of our forms: all that are uint8 and 1-D are."""
    return dtype == "U8" and len(shape) == 1


def _count_problem(form: str, dtype: str, shape: tuple[int, ...], count: int, coded: bool) -> str | None:
    size = math.prod(shape)
    if form == "plain":
        if not (coded or is_stored_like(dtype, shape)):
            return f"plain must be U8 and 1-D, got {dtype}"
        return None if count == size else f"plain keeps all of {size} elements, not {count}"
    if count > size:
        return f"it cannot keep {count} of {size} elements"
    if form == "n_of_4" and kept_of_4(size, count) is None:
        return f"{count} of {size} elements are not N of every 4"
    return None


def code_bytes(form: str, size: int, count: int) -> int:
    """How long the code of the places is, of `count` values in `size` elements."""
    match form:
        case "bitmask":
            return -(-size // 8)
        case "elias_fano":
            return elias_fano.code_bytes(size, count)
        case "n_of_4":
            return n_of_4_codec.code_bytes(size, count)
    return 0


def places(form: StoredForm) -> tuple[int, int, int]:
    """Where the values begin and end, and where the code begins."""
    begin = HEAD.size + 8 * (len(form.shape) + len(form.planes))
    count = form.size if form.nonzeros is None else form.nonzeros
    end = begin + (sum(form.planes) if form.planes else count * DTYPE_BITS[form.dtype] // 8)
    return begin, end, _padded(end)


def _padded(length: int) -> int:
    return length + -length % 8


def damaged(reason: str) -> ValueError:
    """What is raised where a stored tensor is not what it says."""
    return ValueError(f"A stored tensor is not usable: {reason}. The file is truncated, damaged or hostile.")
