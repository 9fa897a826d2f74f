"""What are the bytes of a new tensor made of? A piece names sources and a rule; it holds no weights of a model."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


NUMBER_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # dtypes that rules beyond copying know


@dataclass(frozen=True)
class CopyBytes:
    """`length` bytes of a safetensors `file` from the absolute `offset` on, whatever their dtype."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class CopyColumns:
    """Neighbouring columns of a matrix: `width` bytes of each of `rows` rows, the first byte at `offset`.

    `row_bytes` is the length of a whole row of the matrix, also whatever its dtype.
    """

    file: Path
    offset: int
    rows: int
    row_bytes: int
    width: int

    @property
    def length(self) -> int:
        """Bytes."""
        return self.rows * self.width


@dataclass(frozen=True)
class FillZeros:
    """`length` zero bytes: the number zero in every dtype that has one."""

    length: int


@dataclass(frozen=True)
class GivenBytes:
    """A few bytes that were computed before, such as those of a router."""

    data: bytes

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.data)


@dataclass(frozen=True)
class DrawNormal:
    """`count` numbers from N(0, std^2), fixed by `key` alone; see `draw_block`."""

    count: int
    std: float
    dtype: Literal["F32", "BF16", "F16"]
    key: str

    def __post_init__(self) -> None:
        _check_numbers(self.dtype)
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"`std` must be a number of at least 0, got {self.std!r}.")

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * NUMBER_BYTES[self.dtype]


@dataclass(frozen=True)
class Term:
    """`scale` times the numbers of a piece, which are stored in `dtype`."""

    scale: float
    piece: CopyBytes | CopyColumns | DrawNormal
    dtype: Literal["F32", "BF16", "F16"]

    def __post_init__(self) -> None:
        _check_numbers(self.dtype)


@dataclass(frozen=True)
class WeightedSum:
    """The sum of terms of equal size, computed in float32 and rounded once to `dtype`, to the nearest, ties to even.

    One term scaled by a power of two is exact, unless it leaves the range of `dtype`.
    """

    terms: tuple[Term, ...]
    dtype: Literal["F32", "BF16", "F16"]

    def __post_init__(self) -> None:
        _check_numbers(self.dtype)
        counts = {term.piece.length // NUMBER_BYTES[term.dtype] for term in self.terms}
        if len(counts) != 1:
            raise ValueError(f"The terms of a sum must have equally many numbers, got {sorted(counts)}.")

    @property
    def count(self) -> int:
        """Numbers."""
        return self.terms[0].piece.length // NUMBER_BYTES[self.terms[0].dtype]

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * NUMBER_BYTES[self.dtype]


@dataclass(frozen=True)
class RedrawLines:
    """A matrix some of whose rows or columns are drawn anew from N(mean, std^2) of what they held before.

    `floor(fraction * lines)` lines are chosen by `lines_key` alone, so that matrices with one key and equally many
    lines lose the same; the new numbers are fixed by `key`. Mean and deviation are taken when the piece is written.
    """

    base: CopyBytes
    dtype: Literal["F32", "BF16", "F16"]
    shape: tuple[int, int]
    along: Literal["rows", "columns"]
    fraction: float
    lines_key: str
    key: str

    def __post_init__(self) -> None:
        _check_numbers(self.dtype)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"`fraction` must be in [0, 1], got {self.fraction!r}.")
        _check_matrix(self.base, self.dtype, self.shape)

    @property
    def length(self) -> int:
        """Bytes."""
        return self.base.length


@dataclass(frozen=True)
class AddLowRank:
    """A matrix W of `shape` plus scale B A, computed in float32 and rounded once to W's dtype.

    `left` is B of shape (rows, rank), `right` is A of shape (rank, columns), both row-major float32.
    """

    base: CopyBytes
    dtype: Literal["F32", "BF16", "F16"]
    shape: tuple[int, int]
    left: CopyBytes | CopyColumns
    right: CopyBytes | CopyColumns
    scale: float

    def __post_init__(self) -> None:
        _check_numbers(self.dtype)
        _check_matrix(self.base, self.dtype, self.shape)
        rows, columns = self.shape
        ranks = {self.left.length / (4 * rows), self.right.length / (4 * columns)}
        if len(ranks) > 1 or not next(iter(ranks)).is_integer():
            raise ValueError(f"`left` and `right` must be float32 factors of one rank, got ranks {sorted(ranks)}.")

    @property
    def length(self) -> int:
        """Bytes."""
        return self.base.length


Piece = CopyBytes | CopyColumns | FillZeros | GivenBytes | DrawNormal | WeightedSum | RedrawLines | AddLowRank


def source_files(piece: Piece) -> Iterator[Path]:
    """The files that a piece reads, each as often as it does."""
    for value in _leaves(piece):
        if isinstance(value, Path):
            yield value


def identity(piece: Piece, number_of: Callable[[Path], int]) -> list:
    """What decides the bytes of a piece, for a digest: its kind and every field, files as numbers."""
    return [
        number_of(value) if isinstance(value, Path) else hashlib.sha256(value).hexdigest() if isinstance(value, bytes)
        else value
        for value in _leaves(piece)
    ]  # fmt: skip


def _leaves(value: object) -> Iterator[object]:
    """Every field of a piece, depth first, the kinds of nested ones before their fields."""
    if dataclasses.is_dataclass(value):
        yield type(value).__name__
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _check_numbers(dtype: str) -> None:
    if dtype not in NUMBER_BYTES:
        raise ValueError(f"`dtype` must be one of {', '.join(NUMBER_BYTES)} to be computed with, got {dtype!r}.")


def _check_matrix(base: CopyBytes, dtype: str, shape: tuple[int, int]) -> None:
    if base.length != math.prod(shape) * NUMBER_BYTES[dtype]:
        raise ValueError(f"A {dtype} matrix of shape {list(shape)} cannot have {base.length} bytes.")
