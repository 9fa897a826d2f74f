"""What will the shards of a new checkpoint hold, byte by byte? A plan names sources; it holds no weights."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sparse_hf.storage.tensor_headers import DTYPE_BITS, SINGLE_FILE, header_sha256


NUMBERS_PER_BLOCK = 1 << 16  # part of what a key means: another value gives other numbers
DRAWN_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class CopyBytes:
    """`length` bytes of a safetensors `file` from the absolute `offset` on, whatever their dtype."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class FillZeros:
    """`length` zero bytes: the number zero in every dtype that has one."""

    length: int


@dataclass(frozen=True)
class DrawNormal:
    """`count` numbers from N(0, std^2), fixed by `key` alone; see `draw_block`."""

    count: int
    std: float
    dtype: Literal["F32", "BF16", "F16"]
    key: str

    def __post_init__(self) -> None:
        if self.dtype not in DRAWN_BYTES:
            raise ValueError(f"`dtype` must be one of {', '.join(DRAWN_BYTES)} to be drawn, got {self.dtype!r}.")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"`std` must be a number of at least 0, got {self.std!r}.")

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * DRAWN_BYTES[self.dtype]


Piece = CopyBytes | FillZeros | DrawNormal


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
            if isinstance(piece, DrawNormal) and piece.dtype != self.dtype:
                raise ValueError(f"`{self.name}` is {self.dtype}, so numbers drawn for it cannot be {piece.dtype}.")

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
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for shard in shards:
        for tensor in shard.tensors:
            pieces = [_identity(piece, sources) for piece in tensor.pieces]
            line = [shard.name, tensor.name, tensor.dtype, tensor.shape, pieces]
            digest.update(b"\n" + json.dumps(line).encode())
    digest.update(b"\n" + json.dumps(list(sources.values())).encode())
    return digest.hexdigest()


def draw_block(piece: DrawNormal, block: int) -> bytes:
    """Numbers `block * NUMBERS_PER_BLOCK` and following of `piece`, little-endian; the last block is shorter.

    Philox is keyed by the sha256 of `piece.key` and its counter begins anew for every block, so no block depends on
    another or on who draws it. numpy may change how it makes normal numbers between releases, see `plan_digest`.
    """
    count = min(NUMBERS_PER_BLOCK, piece.count - block * NUMBERS_PER_BLOCK)
    key = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key, counter=block << 192))
    numbers = generator.standard_normal(count, dtype=np.float32) * np.float32(piece.std)
    match piece.dtype:
        case "BF16":
            return round_to_bf16(numbers).astype("<u2").tobytes()
        case "F16":
            return numbers.astype("<f2").tobytes()
    return numbers.astype("<f4").tobytes()


def round_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 `numbers` rounded to bfloat16, to the nearest, ties to even; NaN becomes 0x7FC0."""
    bits = numbers.view(np.uint32)
    to_nearest = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), to_nearest).astype(np.uint16)


def _widest_first(tensors: list[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype]))


def _identity(piece: Piece, sources: dict[Path, list]) -> list:
    match piece:
        case CopyBytes(file, offset, length):
            if file not in sources:
                # Its number keeps files of one name apart, as in two models whose experts are put together.
                sources[file] = [len(sources), file.name, file.stat().st_size, header_sha256(file)]
            return ["copy", sources[file][0], offset, length]
        case FillZeros(length):
            return ["zeros", length]
        case DrawNormal(count, std, dtype, key):
            return ["normal", count, std, dtype, key, np.__version__]
