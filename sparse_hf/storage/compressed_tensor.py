"""One tensor without its zeros, as bytes that say themselves what they are (`stored_form`), and back."""

import struct

import numpy as np

from sparse_hf.algorithms.elias_fano import compress_elias_fano, expand_elias_fano
from sparse_hf.algorithms.n_of_4_codec import compress_n_of_4, expand_n_of_4, kept_of_4, obeys_n_of_4
from sparse_hf.algorithms.nonzeros import NOTHING, compress_bitmask, expand_bitmask
from sparse_hf.storage.stored_form import (
    ELEMENTS,
    HEAD,
    LONGEST_HEAD,
    MAGIC,
    ZSTD,
    StoredForm,
    code_bytes,
    damaged,
    is_stored_like,
    places,
    read_form,
)
from sparse_hf.storage.tensor_headers import DTYPE_BITS
from sparse_hf.storage.value_coding import code_values, decode_values


COMPRESSORS = {"bitmask": compress_bitmask, "n_of_4": compress_n_of_4, "elias_fano": compress_elias_fano}
EXPANDERS = {"bitmask": expand_bitmask, "n_of_4": expand_n_of_4, "elias_fano": expand_elias_fano}

LEAST_SAVING = 1 / 16  # of the dense size; below, a tensor stays dense
SAMPLED = 1 << 16  # elements, the first sixteenth of which is counted to guess how many are not zero
MOST_PADDING = 14  # bytes after values and code
LEAST_GAIN = {"bitmask": 0, "n_of_4": 1 / 32, "elias_fano": 1 / 16}  # of the size as a bitmask, which is faster


def compress_tensor(
    data: np.ndarray, dtype: str, shape: tuple[int, ...], zstd: bool = False
) -> list[np.ndarray] | None:
    """The stored form of a tensor, in parts to be written one after the other; None if it should stay dense.

    Besides `data` and the parts little is allocated.

    Args:
        data: uint8, 1-D: the tensor's bytes in row-major order.
        dtype: as safetensors spells it.
        zstd: code the values too.
    """
    if is_stored_like(dtype, shape):
        return _parts("plain", dtype, shape, [data], NOTHING, zstd)
    if DTYPE_BITS[dtype] not in ELEMENTS or not len(data):
        return None
    elements = data.view(ELEMENTS[DTYPE_BITS[dtype]])
    found = _without_zeros(elements, dtype, shape)
    if found is not None:
        return _parts(found[0], dtype, shape, *found[1:], zstd)
    parts = _parts("plain", dtype, shape, [elements], NOTHING, zstd) if zstd else []
    return parts if parts and sum(map(len, parts)) <= (1 - LEAST_SAVING) * len(data) else None


def expand_tensor(stored: np.ndarray, most_elements: int | None = None) -> tuple[np.ndarray, StoredForm]:
    """The tensor's bytes (uint8, 1-D) and what it is.

    Args:
        stored: uint8, 1-D.
        most_elements: refuse a tensor of more; None for no limit but that of the forms (a bit per 32 elements).

    Raises:
        ValueError: truncated, damaged or hostile.
        ImportError: values are coded by zstd, and `zstandard` is not installed.
    """
    form = read_form(stored[:LONGEST_HEAD].tobytes(), len(stored), most_elements)
    values_begin, values_end, code_begin = places(form)
    kind = ELEMENTS[DTYPE_BITS[form.dtype]]
    code = stored[code_begin : code_begin + code_bytes(form.form, form.size, form.nonzeros)]
    if stored[values_end:code_begin].any() or stored[code_begin + len(code) :].any():
        raise damaged("its padding is not zero")
    values = stored[values_begin:values_end]
    try:
        values = _decoded(values, form, kind) if form.planes else values.view(kind)
        if form.form == "plain":
            return (values if form.planes else values.copy()).view(np.uint8), form
        out = np.empty(form.size, kind)
        EXPANDERS[form.form](values, code, out)
    except ValueError as error:
        raise damaged(str(error)) from error
    return out.view(np.uint8), form


def _without_zeros(
    elements: np.ndarray, dtype: str, shape: tuple[int, ...]
) -> tuple[str, list[np.ndarray], np.ndarray] | None:
    """The form, the values in pieces, and the code of where they go; None if the tensor should stay dense.

    The form is the best for the guessed number of values at first, and, if this misled, for the number found.
    """
    guess = _guessed_count(elements)
    form = _best_form(elements, guess, dtype, shape)
    values, code = COMPRESSORS[form](elements, guess) if form else ([], NOTHING)
    count = sum(map(len, values)) if form else int(np.count_nonzero(elements))
    if count != guess and form != (best := _best_form(elements, count, dtype, shape)):
        form = best
        values, code = COMPRESSORS[form](elements, count) if form else ([], NOTHING)
    return (form, values, code) if form else None


def _guessed_count(elements: np.ndarray) -> int:
    """About how many elements are not zero; counting all of them would take a tenth of the time of compressing."""
    rows = elements[: len(elements) // SAMPLED * SAMPLED].reshape(-1, SAMPLED)[:, : SAMPLED // 16]
    if not len(rows):
        return int(np.count_nonzero(elements))
    return int(np.count_nonzero(rows != 0)) * len(elements) // rows.size


def _best_form(elements: np.ndarray, count: int, dtype: str, shape: tuple[int, ...]) -> str | None:
    size, width = len(elements), elements.itemsize
    totals = {form: count * width + code_bytes(form, size, count) for form in ("bitmask", "elias_fano")}
    if kept_of_4(size, count) is not None:
        totals["n_of_4"] = count * width + code_bytes("n_of_4", size, count)
    for total, form in sorted((total, form) for form, total in totals.items()):
        if total > (1 - LEAST_GAIN[form]) * totals["bitmask"]:
            continue
        if form != "n_of_4" or obeys_n_of_4(elements, count):
            stored = HEAD.size + 8 * len(shape) + total + MOST_PADDING
            return form if stored <= (1 - LEAST_SAVING) * size * width else None
    return None


def _decoded(stored: np.ndarray, form: StoredForm, kind: np.dtype) -> np.ndarray:
    values = np.empty(form.size if form.nonzeros is None else form.nonzeros, kind)
    decode_values(stored, form.planes, values)
    return values


def _parts(
    form: str, dtype: str, shape: tuple[int, ...], values: list[np.ndarray], code: np.ndarray, zstd: bool
) -> list[np.ndarray]:
    planes = (code_values(values) if zstd else None) or []
    numbers = [*shape, *map(len, planes)]
    name = form + (ZSTD if planes else "")
    head = HEAD.pack(MAGIC, name.encode(), dtype.encode(), len(shape), sum(map(len, values)))
    head += struct.pack(f"<{len(numbers)}Q", *numbers)
    kept = planes or [piece.view(np.uint8) for piece in values]
    padding = np.zeros(-sum(map(len, kept)) % 8, np.uint8)
    parts = [np.frombuffer(head, np.uint8), *kept, padding, code, np.zeros(-len(code) % 8, np.uint8)]
    return [part for part in parts if len(part)]
