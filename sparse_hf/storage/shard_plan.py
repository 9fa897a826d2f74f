"""What will the shards of a new checkpoint hold, byte by byte? A plan names sources; it holds no weights."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_hf.storage.pieces import Piece, identity
from sparse_hf.storage.tensor_headers import DTYPE_BITS, SINGLE_FILE, header_sha256


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new checkpoint: its pieces, one after the other, are its bytes in row-major order.

    Raises:
        ValueError: the dtype is none of safetensors', or the pieces do not add up to dtype x shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            choices = ", ".join(DTYPE_BITS)
            raise ValueError(f"The dtype of `{self.name}` must be one of {choices}, got {self.dtype!r}.")
        bits, length = math.prod(self.shape) * DTYPE_BITS[self.dtype], self.length
        if 8 * length != bits or any(piece.length < 0 for piece in self.pieces):
            raise ValueError(
                f"The pieces of `{self.name}` must add up to {bits / 8:g} bytes for {self.dtype} {list(self.shape)}, "
                f"got {length}."
            )
        for piece in self.pieces:
            if getattr(piece, "dtype", self.dtype) != self.dtype:
                raise ValueError(f"`{self.name}` is {self.dtype}, so numbers made for it cannot be {piece.dtype}.")

    @property
    def length(self) -> int:
        """Bytes."""
        return sum(piece.length for piece in self.pieces)


@dataclass(frozen=True)
class PlannedShard:
    """One safetensors file of the new checkpoint; the data follows the header in the order of `tensors`."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    def header(self) -> bytes:
        """The first bytes of the file, up to the data, which begins at a multiple of 8."""
        content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.length
            content[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def file_bytes(self) -> int:
        """The size of the finished file."""
        return len(self.header()) + sum(tensor.length for tensor in self.tensors)


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> list[PlannedShard]:
    """Cut the tensors, in the given order, into files of at most `max_shard_bytes` bytes of data.

    Greedy: a file is closed when the next tensor no longer fits; a larger tensor gets a file of its own. Within a
    file, tensors of wider dtypes come first, so that each lies at a multiple of its element size, as readers need.

    Raises:
        ValueError: no tensors, two of one name, or a limit below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be at least 1, got {max_shard_bytes}.")
    if not tensors:
        raise ValueError("A checkpoint must hold at least one tensor, got none.")
    names: set[str] = {"__metadata__"}  # taken by the format
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"Every tensor of a checkpoint must have its own name, got `{tensor.name}` twice.")
        names.add(tensor.name)
        if groups[-1] and filled + tensor.length > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.length
    if len(groups) == 1:
        return [PlannedShard(SINGLE_FILE, _widest_first(groups[0]))]
    return [
        PlannedShard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", _widest_first(group))
        for number, group in enumerate(groups, 1)
    ]


def plan_digest(shards: Sequence[PlannedShard], extra: dict) -> str:
    """The sha256 of everything that decides the bytes of the shards; equal plans can be resumed by one another.

    A source file enters by name, size and header, not by path, so that source and destination may move. Fine-tuned
    models of one base agree in all three: tell them apart in `extra`.

    Args:
        extra: options to keep apart that the pieces do not show; anything that JSON can hold.

    Raises:
        FileNotFoundError, ValueError: a source file is gone or is no safetensors file.
    """
    sources: dict[Path, list] = {}

    def number_of(file: Path) -> int:
        if file not in sources:
            # Its number keeps files of one name apart, as in two models whose experts are put together.
            sources[file] = [len(sources), file.name, file.stat().st_size, header_sha256(file)]
        return sources[file][0]

    extra = {**extra, "numpy": np.__version__}  # it may change how it makes normal numbers
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for shard in shards:
        for tensor in shard.tensors:
            pieces = [identity(piece, number_of) for piece in tensor.pieces]
            line = [shard.name, tensor.name, tensor.dtype, tensor.shape, pieces]
            digest.update(b"\n" + json.dumps(line).encode())
    digest.update(b"\n" + json.dumps(list(sources.values())).encode())
    return digest.hexdigest()


def _widest_first(tensors: list[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype]))
