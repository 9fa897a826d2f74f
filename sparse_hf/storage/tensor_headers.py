"""Which tensors does a safetensors checkpoint hold, and where do their bytes lie? Only headers are read."""

import hashlib
import json
import math
import os
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit; held for the index too
MOST_DIMENSIONS = 16

# safetensors' own names -> bits per element; some formats are narrower than a byte.
DTYPE_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32},
    **{"F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: `length` bytes of `file`, row-major, from the absolute `offset` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int

    def rows(self, first: int, count: int) -> "StoredTensor":
        """Neighbouring entries along the first axis; they lie one after the other on disk."""
        row = self.length // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * row, length=count * row)


def read_headers(folder: Path, single: str = SINGLE_FILE, index: str = INDEX_FILE) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, in the order of the bytes on disk.

    Reads `model.safetensors`, or else all shards of `model.safetensors.index.json` in the order in which the index
    first names them. No tensor is read, and nothing in the files is trusted.

    Args:
        single, index: other names for the two files.

    Raises:
        FileNotFoundError: neither file is there, or shards that the index names are missing.
        ValueError: a file is truncated, damaged or hostile, or the index and the shards disagree.
    """
    if (folder / single).is_file():
        return read_header(folder / single)
    placed = _read_index(folder / index, single)
    if missing := [shard for shard in placed if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"`{folder}` must hold every shard that `{index}` names, {len(missing)} of {len(placed)} "
            f"are missing: {reprlib.repr(missing)}. Download the checkpoint again."
        )
    found: dict[str, StoredTensor] = {}
    for shard, names in placed.items():
        stored = read_header(folder / shard)
        for absent, present in ((names - stored.keys(), index), (stored.keys() - names, shard)):
            if absent:
                raise ValueError(
                    f"`{index}` and `{shard}` in `{folder}` must name the same tensors, but `{min(absent)}` is "
                    f"only in `{present}`. The files belong to different checkpoints; download them again."
                )
        found |= stored
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, by name, in the order of the bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, damaged or hostile: what safetensors itself would refuse, duplicate names too.
    """
    raw = _header_bytes(file)
    start, size = 8 + len(raw), file.stat().st_size
    entries = _json_object(raw, file)
    entries.pop("__metadata__", None)
    tensors = sorted((_checked_tensor(name, entry, start, file) for name, entry in entries.items()), key=_position)
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _damaged(file, f"`{tensor.name}` {problem}")
        end += tensor.length
    if end != size:
        raise _damaged(file, f"its header describes {end} bytes, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def header_sha256(file: Path) -> str:
    """The hash of a safetensors file's header, its length included: names, dtypes, shapes and offsets in one number.

    Raises:
        FileNotFoundError, ValueError: as `read_header`, as far as the header can be found.
    """
    raw = _header_bytes(file)
    return hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()


def _position(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.offset, tensor.length  # an empty tensor lies before the one that begins at the same byte


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"`{file}` is not a usable checkpoint file: {reason}. It is truncated, damaged or hostile; download it again."
    )


def _header_bytes(file: Path) -> bytes:
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` does not exist.")
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise _damaged(
                file,
                f"a header of {length} bytes does not fit into its {size} bytes or the {LARGEST_HEADER} allowed "
                "(is it a Git LFS pointer?)",
            )
        return stream.read(length)


def _json_object(raw: bytes, file: Path) -> dict:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: also wrong UTF-8, numbers of thousands of digits
        raise _damaged(file, f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(file, f"it must hold a JSON object, got a {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    content: dict[str, object] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{reprlib.repr(name)} is there twice")
        content[name] = value
    return content


def _checked_tensor(name: str, entry: object, start: int, file: Path) -> StoredTensor:
    if not name or not name.isprintable():
        raise _damaged(file, f"{reprlib.repr(name)} is no tensor name")
    if not isinstance(entry, dict):
        raise _damaged(file, f"`{name}` is described by {reprlib.repr(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        choices = ", ".join(DTYPE_BITS)
        raise _damaged(file, f"the dtype of `{name}` must be one of {choices}, got {reprlib.repr(dtype)}")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise _damaged(file, f"the shape of `{name}` is {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"the offsets of `{name}` are {reprlib.repr(offsets)}")
    length = offsets[1] - offsets[0]
    if 8 * length != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _damaged(file, f"`{name}` of {dtype} {reprlib.repr(shape)} cannot take {length} bytes")
    return StoredTensor(name, dtype, tuple(shape), file, start + offsets[0], length)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _read_index(file: Path, single: str) -> dict[str, set[str]]:
    """Tensor names by shard, in the order of the index; every shard is a plain file name."""
    if not file.is_file():
        raise FileNotFoundError(
            f"`{file.parent}` must hold `{single}` or `{file.name}`, it holds neither. "
            "Give the folder of a safetensors checkpoint."
        )
    if (size := file.stat().st_size) > LARGEST_HEADER:
        raise _damaged(file, f"it has {size} bytes, at most {LARGEST_HEADER} are allowed")
    weight_map = _json_object(file.read_bytes(), file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(file, "its `weight_map` does not map tensor names to shards")
    placed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise _damaged(
                file, f"{reprlib.repr(shard)} is no shard: it must be the name of a .safetensors file in this folder"
            )
        placed.setdefault(shard, set()).add(name)
    return placed


def _is_shard_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and shard.isprintable()
        and shard.endswith(".safetensors")
        and len(shard) <= 255
        and not set(shard) & {"/", "\\", ":"}  # so neither a subfolder nor `..` nor a drive
    )
