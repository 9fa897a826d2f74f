"""How do the bytes of a piece come about, block by block, so that no matrix is held in memory?"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from sparse_hf.storage.pieces import (
    NUMBER_BYTES,
    AddLowRank,
    CopyBytes,
    CopyColumns,
    DrawNormal,
    FillZeros,
    GivenBytes,
    Piece,
    RedrawLines,
    WeightedSum,
)


NUMBERS_PER_BLOCK = 1 << 16  # part of what a key means: another value gives other numbers
COMPUTED_NUMBERS = 4 * NUMBERS_PER_BLOCK  # at a time
READ_BYTES = 4 << 20  # at a time


class SourceFiles:
    """Files that are read at given places, each opened once."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, file: Path) -> int:
        """Of the file, open for reading."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def read(self, file: Path, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            ValueError: the file ends before.
        """
        parts, end = [], offset + length
        while offset < end:
            parts.append(os.pread(self.descriptor(file), end - offset, offset))
            if not parts[-1]:
                raise too_short(file, end, offset)
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)


def too_short(file: Path, wanted: int, end: int) -> ValueError:
    """The error for a source that has lost bytes since its header was read."""
    return ValueError(f"`{file}` must have at least {wanted} bytes, it ends at {end}: it was changed.")


def piece_blocks(piece: Piece, sources: SourceFiles) -> Iterator[bytes]:
    """The bytes of a piece, one after the other, in blocks of a few MiB.

    Raises:
        ValueError: a source file is too short.
    """
    match piece:
        case CopyBytes(file, offset, length):
            for start in range(0, length, READ_BYTES):
                yield sources.read(file, offset + start, min(READ_BYTES, length - start))
        case CopyColumns(_, _, rows, row_bytes, _):
            step = max(1, READ_BYTES // row_bytes)
            for first in range(0, rows, step):
                yield _column_bytes(piece, sources, first, min(step, rows - first)).tobytes()
        case FillZeros(length):
            for start in range(0, length, READ_BYTES):
                yield bytes(min(READ_BYTES, length - start))
        case GivenBytes(data):
            yield data
        case DrawNormal(count):
            for block in range(-(-count // NUMBERS_PER_BLOCK)):
                yield draw_block(piece, block)
        case WeightedSum():
            yield from _sum_blocks(piece, sources)
        case RedrawLines():
            yield from _redrawn_blocks(piece, sources)
        case AddLowRank():
            yield from _low_rank_blocks(piece, sources)


def _column_bytes(piece: CopyColumns, sources: SourceFiles, first: int, rows: int) -> np.ndarray:
    """uint8 of shape (rows, width); the rows are read whole."""
    span = (rows - 1) * piece.row_bytes + piece.width
    read = np.frombuffer(sources.read(piece.file, piece.offset + first * piece.row_bytes, span), np.uint8)
    return np.lib.stride_tricks.as_strided(read, (rows, piece.width), (piece.row_bytes, 1), writeable=False)


def _sum_blocks(piece: WeightedSum, sources: SourceFiles) -> Iterator[bytes]:
    for first in range(0, piece.count, COMPUTED_NUMBERS):
        count = min(COMPUTED_NUMBERS, piece.count - first)
        total = np.zeros(count, np.float32)
        for term in piece.terms:
            total += np.float32(term.scale) * _numbers(term.piece, term.dtype, sources, first, count)
        yield encode(total, piece.dtype)


def _redrawn_blocks(piece: RedrawLines, sources: SourceFiles) -> Iterator[bytes]:
    chosen = redrawn_lines(piece)
    mean, std = _moments(piece, chosen, sources)
    fresh = DrawNormal(piece.shape[0] * piece.shape[1], 1.0, "F32", piece.key)
    for first, count, numbers in _computed(piece.base, piece.dtype, sources):
        places = _in_lines(piece, chosen, first, count)
        drawn = _numbers(fresh, "F32", sources, first, count)
        yield encode(np.where(places, drawn * std + mean, numbers), piece.dtype)


def redrawn_lines(piece: RedrawLines) -> np.ndarray:
    """Which lines are drawn anew: booleans, one per row or column."""
    lines = piece.shape[0] if piece.along == "rows" else piece.shape[1]
    chosen = np.zeros(lines, bool)
    chosen[_generator(piece.lines_key, 0).permutation(lines)[: int(piece.fraction * lines)]] = True
    return chosen


def _in_lines(piece: RedrawLines, chosen: np.ndarray, first: int, count: int) -> np.ndarray:
    places = np.arange(first, first + count)
    return chosen[places // piece.shape[1] if piece.along == "rows" else places % piece.shape[1]]


def _moments(piece: RedrawLines, chosen: np.ndarray, sources: SourceFiles) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of what is lost."""
    total, squares, size = 0.0, 0.0, 0
    for first, count, numbers in _computed(piece.base, piece.dtype, sources):
        lost = numbers[_in_lines(piece, chosen, first, count)].astype(np.float64)
        total, squares, size = total + lost.sum(), squares + np.square(lost).sum(), size + lost.size
    mean = total / max(size, 1)
    return np.float32(mean), np.float32(max(squares / max(size, 1) - mean**2, 0.0) ** 0.5)


def _low_rank_blocks(piece: AddLowRank, sources: SourceFiles) -> Iterator[bytes]:
    rows, columns = piece.shape
    left, right = (
        _numbers(factor, "F32", sources, 0, factor.length // 4).reshape(shape)
        for factor, shape in ((piece.left, (rows, -1)), (piece.right, (-1, columns)))
    )
    step = max(1, COMPUTED_NUMBERS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        numbers = _numbers(piece.base, piece.dtype, sources, first * columns, count * columns)
        product = np.float32(piece.scale) * (left[first : first + count] @ right)
        yield encode(numbers + product.ravel(), piece.dtype)


def _computed(base: CopyBytes, dtype: str, sources: SourceFiles) -> Iterator[tuple[int, int, np.ndarray]]:
    """Position, count and numbers of each block of a matrix."""
    total = base.length // NUMBER_BYTES[dtype]
    for first in range(0, total, COMPUTED_NUMBERS):
        count = min(COMPUTED_NUMBERS, total - first)
        yield first, count, _numbers(base, dtype, sources, first, count)


def _numbers(
    piece: CopyBytes | CopyColumns | DrawNormal, dtype: str, sources: SourceFiles, first: int, count: int
) -> np.ndarray:
    """Numbers `first` to `first + count` of a piece, as float32; for drawn ones `first` must begin a block."""
    size = NUMBER_BYTES[dtype]
    match piece:
        case CopyBytes(file, offset):
            return decode(sources.read(file, offset + size * first, size * count), dtype)
        case CopyColumns(_, _, _, _, width):
            row = first * size // width
            rows = -(-(first + count) * size // width) - row
            skipped = first - row * width // size
            read = _column_bytes(piece, sources, row, rows).tobytes()
            return decode(read, dtype)[skipped : skipped + count]
        case DrawNormal():
            block = first // NUMBERS_PER_BLOCK
            blocks = range(block, block + -(-count // NUMBERS_PER_BLOCK))
            return decode(b"".join(draw_block(piece, one) for one in blocks), dtype)[:count]


def draw_block(piece: DrawNormal, block: int) -> bytes:
    """Numbers `block * NUMBERS_PER_BLOCK` and following of `piece`, little-endian; the last block is shorter.

    Philox is keyed by the sha256 of `piece.key` and its counter begins anew for every block, so no block depends on
    another or on who draws it. numpy may change how it makes normal numbers between releases, see `plan_digest`.
    """
    count = min(NUMBERS_PER_BLOCK, piece.count - block * NUMBERS_PER_BLOCK)
    numbers = _generator(piece.key, block).standard_normal(count, dtype=np.float32) * np.float32(piece.std)
    return encode(numbers, piece.dtype)


def _generator(key: str, block: int) -> np.random.Generator:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=number, counter=block << 192))


def encode(numbers: np.ndarray, dtype: str) -> bytes:
    """The bytes of float32 `numbers` in a dtype of safetensors, little-endian, rounded to the nearest."""
    match dtype:
        case "BF16":
            return round_to_bf16(numbers).astype("<u2").tobytes()
        case "F16":
            return numbers.astype("<f2").tobytes()
    return numbers.astype("<f4").tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    """The float32 numbers that bytes of a dtype of safetensors stand for."""
    match dtype:
        case "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(data, "<f2").astype(np.float32)
    return np.frombuffer(data, "<f4")


def round_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 `numbers` rounded to bfloat16, to the nearest, ties to even; NaN becomes 0x7FC0."""
    bits = numbers.view(np.uint32)
    to_nearest = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), to_nearest).astype(np.uint16)
