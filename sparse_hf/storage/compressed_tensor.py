"""One tensor without its zeros, as bytes that say themselves what they are.

A stored tensor is uint8 and 1-D: a head, the kept values, the code of where they go; each part ends at a multiple of
8 bytes. All lengths follow from the head, so a file that claims more than it holds is refused before anything is
allocated. Reading trusts nothing.
"""

import math
import reprlib
import struct
from dataclasses import dataclass

import numpy as np

from sparse_hf.algorithms import elias_fano, n_of_4_codec
from sparse_hf.algorithms.elias_fano import compress_elias_fano, expand_elias_fano
from sparse_hf.algorithms.n_of_4_codec import compress_n_of_4, expand_n_of_4, kept_of_4, obeys_n_of_4
from sparse_hf.algorithms.nonzeros import compress_bitmask, expand_bitmask
from sparse_hf.storage.tensor_headers import DTYPE_BITS, MOST_DIMENSIONS


MAGIC = b"sparsehf"
HEAD = struct.Struct(
    "<8s16s16sQQ"
)  # magic, form, dtype, number of dimensions, kept values; then 8 bytes per dimension
LONGEST_HEAD = HEAD.size + 8 * MOST_DIMENSIONS
ELEMENTS = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}  # bits -> looked at as

# Forms. "plain" keeps everything: a 1-D uint8 tensor, which a reader could not tell from a stored one, is stored so.
COMPRESSORS = {"bitmask": compress_bitmask, "n_of_4": compress_n_of_4, "elias_fano": compress_elias_fano}
EXPANDERS = {"bitmask": expand_bitmask, "n_of_4": expand_n_of_4, "elias_fano": expand_elias_fano}

LEAST_SAVING = 1 / 16  # of the dense size; below, a tensor stays dense
LEAST_GAIN = 1 / 32  # of the size as a bitmask, which is written and read faster at moderate sparsity


@dataclass(frozen=True)
class StoredForm:
    """How a tensor is stored.

    Attributes:
        form: "bitmask", "n_of_4", "elias_fano", "plain", or "dense" for a tensor that is stored as it is.
        dtype: of the tensor itself, as safetensors spells it.
        shape: of the tensor itself.
        nonzeros: elements kept; None for "dense" and "plain", where nobody counted.
        length: bytes on disk.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    nonzeros: int | None
    length: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """What the tensor takes with its zeros."""
        return self.size * DTYPE_BITS[self.dtype] // 8


def compress_tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> list[np.ndarray] | None:
    """The stored form of a tensor, in parts to be written one after the other; None if it should stay dense.

    Besides `data` and the parts little is allocated.

    Args:
        data: uint8, 1-D: the tensor's bytes in row-major order.
        dtype: as safetensors spells it.
    """
    if is_stored_like(dtype, shape):
        return _parts("plain", dtype, shape, len(data), data, np.empty(0, np.uint8))
    if DTYPE_BITS[dtype] not in ELEMENTS or not len(data):
        return None
    elements = data.view(ELEMENTS[DTYPE_BITS[dtype]])
    count = int(np.count_nonzero(elements))
    form = _best_form(elements, count, dtype, shape)
    return form and _parts(form, dtype, shape, count, *COMPRESSORS[form](elements, count))


def expand_tensor(stored: np.ndarray, most_elements: int | None = None) -> tuple[np.ndarray, StoredForm]:
    """The tensor's bytes (uint8, 1-D) and what it is.

    Args:
        stored: uint8, 1-D.
        most_elements: refuse a tensor of more; None for no limit but that of the forms (a bit per 32 elements).

    Raises:
        ValueError: truncated, damaged or hostile.
    """
    form = read_form(stored[:LONGEST_HEAD].tobytes(), len(stored), most_elements)
    values_begin, code_begin = _places(form)
    if form.form == "plain":
        return stored[values_begin : values_begin + form.dense_bytes].copy(), form
    kind = ELEMENTS[DTYPE_BITS[form.dtype]]
    values_end = values_begin + form.nonzeros * kind.itemsize
    code = stored[code_begin : code_begin + _code_bytes(form.form, form.size, form.nonzeros)]
    if stored[values_end:code_begin].any() or stored[code_begin + len(code) :].any():
        raise _damaged("its padding is not zero")
    out = np.zeros(form.size, kind)  # fresh from the system, which need not be cleared again
    try:
        EXPANDERS[form.form](stored[values_begin:values_end].view(kind), code, out)
    except ValueError as error:
        raise _damaged(str(error)) from error
    return out.view(np.uint8), form


def read_form(head: bytes, length: int, most_elements: int | None = None) -> StoredForm:
    """What a stored tensor is, from its first `LONGEST_HEAD` bytes, or all if it has fewer.

    Args:
        length: of the whole stored tensor.
        most_elements: as in `expand_tensor`.

    Raises:
        ValueError: it cannot be a tensor of ours of that length.
    """
    if len(head) < HEAD.size:
        raise _damaged(f"{len(head)} bytes are too few")
    magic, form, dtype, dimensions, count = HEAD.unpack_from(head)
    form, dtype = (text.rstrip(b"\0").decode("latin-1") for text in (form, dtype))
    if magic != MAGIC:
        raise _damaged(f"it begins with {magic!r} instead of {MAGIC!r}")
    if form not in EXPANDERS and form != "plain":
        raise _damaged(f"its form must be one of {', '.join(EXPANDERS)}, plain, got {form!r}")
    if DTYPE_BITS.get(dtype) not in ELEMENTS:
        raise _damaged(f"its dtype is {dtype!r}")
    if dimensions > MOST_DIMENSIONS or len(head) < HEAD.size + 8 * dimensions:
        raise _damaged(f"it cannot have {dimensions} dimensions")
    shape = struct.unpack_from(f"<{dimensions}Q", head, HEAD.size)
    size = math.prod(shape)
    if size >= 2**48 or (most_elements is not None and size > most_elements):
        raise _damaged(f"a shape of {reprlib.repr(list(shape))} is larger than any that belongs here")
    problem = _count_problem(form, dtype, shape, count)
    if problem:
        raise _damaged(problem)
    found = StoredForm(form, dtype, shape, None if form == "plain" else count, length)
    code_bytes = _code_bytes(form, size, count)
    if _padded(_places(found)[1] + code_bytes) != length:
        raise _damaged(f"{form} of {dtype} {list(shape)} with {count} values cannot take {length} bytes")
    return found


def is_stored_like(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor in a compressed checkpoint is in one of our forms: all that are uint8 and 1-D are."""
    return dtype == "U8" and len(shape) == 1


def _count_problem(form: str, dtype: str, shape: tuple[int, ...], count: int) -> str | None:
    size = math.prod(shape)
    if form == "plain":
        return None if is_stored_like(dtype, shape) and count == size else f"plain must be U8 and 1-D, got {dtype}"
    if count > size:
        return f"it cannot keep {count} of {size} elements"
    if form == "n_of_4" and kept_of_4(size, count) is None:
        return f"{count} of {size} elements are not N of every 4"
    return None


def _best_form(elements: np.ndarray, count: int, dtype: str, shape: tuple[int, ...]) -> str | None:
    size, width = len(elements), elements.itemsize
    totals = {form: count * width + _code_bytes(form, size, count) for form in ("bitmask", "elias_fano")}
    if kept_of_4(size, count) is not None:
        totals["n_of_4"] = count * width + _code_bytes("n_of_4", size, count)
    least = (1 - LEAST_GAIN) * totals["bitmask"]
    better = sorted((total, form) for form, total in totals.items() if total <= least)
    for total, form in [*better, (totals["bitmask"], "bitmask")]:
        if form != "n_of_4" or obeys_n_of_4(elements, count):
            return form if HEAD.size + 8 * len(shape) + total <= (1 - LEAST_SAVING) * size * width else None
    return None


def _code_bytes(form: str, size: int, count: int) -> int:
    match form:
        case "bitmask":
            return -(-size // 8)
        case "elias_fano":
            return elias_fano.code_bytes(size, count)
        case "n_of_4":
            return n_of_4_codec.code_bytes(size, count)
    return 0


def _places(form: StoredForm) -> tuple[int, int]:
    """Where the values and the code begin."""
    values = HEAD.size + 8 * len(form.shape)
    count = form.size if form.nonzeros is None else form.nonzeros
    return values, _padded(values + count * DTYPE_BITS[form.dtype] // 8)


def _parts(
    form: str, dtype: str, shape: tuple[int, ...], count: int, values: np.ndarray, code: np.ndarray
) -> list[np.ndarray]:
    head = HEAD.pack(MAGIC, form.encode(), dtype.encode(), len(shape), count) + struct.pack(f"<{len(shape)}Q", *shape)
    parts = []
    for part in (np.frombuffer(head, np.uint8), values.view(np.uint8), code):
        parts += [part, np.zeros(-len(part) % 8, np.uint8)]
    return [part for part in parts if len(part)]


def _padded(length: int) -> int:
    return length + -length % 8


def _damaged(reason: str) -> ValueError:
    return ValueError(f"A stored tensor is not usable: {reason}. The file is truncated, damaged or hostile.")
