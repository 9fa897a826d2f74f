"""How do the bytes of a piece come about, block by block, so that no matrix is held in memory?"""

import functools
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
        numbers = (
            np.float32(term.scale) * _numbers(term.piece, term.dtype, sources, first, count) for term in piece.terms
        )
        yield encode(functools.reduce(np.add, numbers), piece.dtype)


def _redrawn_blocks(piece: RedrawLines, sources: SourceFiles) -> Iterator[bytes]:
    chosen = redrawn_lines(piece)
    mean, std = _moments(piece, chosen, sources)
    fresh = _NormalNumbers(piece.key)
    for first, rows in _row_blocks(piece.base, piece.dtype, piece.shape, sources):
        rows = rows.copy()
        if piece.along == "rows":
            lost = chosen[first : first + len(rows)]
            rows[lost] = fresh.take(int(lost.sum()), piece.shape[1]) * std + mean
        else:
            rows[:, chosen] = fresh.take(len(rows), int(chosen.sum())) * std + mean
        yield encode(rows, piece.dtype)


class _NormalNumbers:
    """Numbers from N(0, 1), one after the other, fixed by a key and by how many were taken before."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._block = 0
        self._left = np.empty(0, np.float32)

    def take(self, rows: int, columns: int) -> np.ndarray:
        """float32 of shape (rows, columns)."""
        parts = [self._left]
        while sum(map(len, parts)) < rows * columns:
            parts.append(_generator(self._key, self._block).standard_normal(NUMBERS_PER_BLOCK, dtype=np.float32))
            self._block += 1
        drawn = np.concatenate(parts)
        self._left = drawn[rows * columns :]
        return drawn[: rows * columns].reshape(rows, columns)


def redrawn_lines(piece: RedrawLines) -> np.ndarray:
    """Which lines are drawn anew: booleans, one per row or column."""
    lines = piece.shape[0] if piece.along == "rows" else piece.shape[1]
    chosen = np.zeros(lines, bool)
    chosen[_generator(piece.lines_key, 0).permutation(lines)[: int(piece.fraction * lines)]] = True
    return chosen


def _moments(piece: RedrawLines, chosen: np.ndarray, sources: SourceFiles) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of what is lost."""
    total, squares, size = 0.0, 0.0, 0
    for first, rows in _row_blocks(piece.base, piece.dtype, piece.shape, sources):
        lost = rows[chosen[first : first + len(rows)]] if piece.along == "rows" else rows[:, chosen]
        total += lost.sum(dtype=np.float64)
        squares += np.square(lost, dtype=np.float64).sum()
        size += lost.size
    mean = total / max(size, 1)
    return np.float32(mean), np.float32(max(squares / max(size, 1) - mean**2, 0.0) ** 0.5)


def _low_rank_blocks(piece: AddLowRank, sources: SourceFiles) -> Iterator[bytes]:
    rows, columns = piece.shape
    left, right = (
        _numbers(factor, "F32", sources, 0, factor.length // 4).reshape(shape)
        for factor, shape in ((piece.left, (rows, -1)), (piece.right, (-1, columns)))
    )
    for first, block in _row_blocks(piece.base, piece.dtype, piece.shape, sources):
        yield encode(block + np.float32(piece.scale) * (left[first : first + len(block)] @ right), piece.dtype)


def _row_blocks(
    base: CopyBytes, dtype: str, shape: tuple[int, int], sources: SourceFiles
) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the float32 numbers of each block of whole rows of a matrix."""
    rows, columns = shape
    step = max(1, COMPUTED_NUMBERS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        numbers = _numbers(base, dtype, sources, first * columns, count * columns)
        yield first, numbers.reshape(count, columns)


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
    to_nearest = bits >> 16
    to_nearest &= 1
    to_nearest += 0x7FFF
    to_nearest += bits
    to_nearest >>= 16
    nan = np.isnan(numbers)
    if nan.any():
        to_nearest[nan] = 0x7FC0
    return to_nearest.astype(np.uint16)
