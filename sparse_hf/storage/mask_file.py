"""How are masks stored: one bit per weight in safetensors, shapes in the header.

The file holds one 1-D uint8 tensor per parameter, keyed by the parameter's canonical name: the flattened mask, eight
weights to a byte, lowest bit first, spare bits zero. The header's metadata carries the shapes. Reading trusts nothing.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_hf.storage.durable import write_file


MASKS_FILE = "sparse_masks.safetensors"
FORMAT = "sparse_hf.masks.v1"
LONGEST_NAME = 512


def save_bits(path: Path, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write packed masks durably; the same masks in the same order are the same bytes.

    Args:
        path: the file, usually `<folder>/sparse_masks.safetensors`.
        bits: packed masks, 1-D uint8 of ceil(numel / 8) bytes, by canonical parameter name.
        shapes: the parameters' shapes, by the same names.

    Raises:
        ValueError: a name or a shape that `load_bits` would refuse.
        OSError: the disk is full or not writable; the previous file survives.
    """
    listed = {name: list(shape) for name, shape in shapes.items()}
    if problem := _problem(listed):
        raise ValueError(f"Masks must belong to named matrices to be saved: {problem}. Rename or exclude it.")
    metadata = {"format": FORMAT, "shapes": json.dumps(listed)}
    write_file(path, lambda partial: _write(partial, bits, metadata))


def load_bits(path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Read packed masks and their shapes; memory stays within a few times the size of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not a mask file, or its header and its contents disagree.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` does not exist. A ticket folder holds `{MASKS_FILE}`.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = _checked_shapes(file.metadata() or {}, list(file.keys()), path)
            bits = {name: _checked_bits(file, name, shape, path) for name, shape in shapes.items()}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    return bits, shapes


def _write(path: Path, bits: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file. The package's own `save_file` writes metadata in an order that varies."""
    header, end = {"__metadata__": metadata}, 0
    for name, packed in bits.items():
        start, end = end, end + packed.numel()
        header[name] = {"dtype": "U8", "shape": [packed.numel()], "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for packed in bits.values():
            file.write(packed.cpu().numpy())


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"`{path}` is not a usable mask file: {reason}. It is truncated, damaged or hostile.")


def _checked_shapes(metadata: dict[str, str], names: list[str], path: Path) -> dict[str, tuple[int, ...]]:
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"its header says format {reprlib.repr(metadata.get('format'))}, expected {FORMAT!r}")
    try:
        shapes = json.loads(metadata.get("shapes", ""))
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise _damaged(path, "the shapes in its header are not JSON") from error
    if not isinstance(shapes, dict) or set(shapes) != set(names):
        raise _damaged(path, "the shapes in its header do not name the tensors it holds")
    if problem := _problem(shapes):
        raise _damaged(path, problem)
    return {name: tuple(shape) for name, shape in shapes.items()}


def _problem(shapes: dict) -> str | None:
    """What no mask file may hold; None if there is nothing of it."""
    for name, shape in shapes.items():
        if not _is_parameter_name(name):
            return f"{reprlib.repr(name)} is not a parameter name"
        whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**40 for size in shape)
        if not whole or not 1 <= len(shape) <= 4:
            return f"the shape of `{name}` is {reprlib.repr(shape)}"
    return None


def _is_parameter_name(name: str) -> bool:
    """Dotted parts, none empty (so no `..`), no path, all printable. A ModuleDict may use dashes or spaces."""
    return len(name) <= LONGEST_NAME and name.isprintable() and all(name.split(".")) and not set(name) & {"/", "\\"}


def _checked_bits(file: safe_open, name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    stored = file.get_slice(name)
    numel = math.prod(shape)
    expected = [-(-numel // 8)]
    if stored.get_dtype() != "U8" or stored.get_shape() != expected:
        raise _damaged(
            path,
            f"the mask of `{name}` must be {expected[0]} bytes for the shape {list(shape)}, "
            f"got {reprlib.repr(stored.get_shape())} of {stored.get_dtype()}",
        )
    # A copy: what safetensors returns is the file itself, mapped, and changes or crashes with it.
    packed = file.get_tensor(name).clone()
    if numel % 8 and int(packed[-1]) >> (numel % 8):
        raise _damaged(path, f"the spare bits of `{name}` must be zero")
    return packed
