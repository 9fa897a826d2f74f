"""How are experts made of a dense FFN: copied, cut into parts, scaled, noised, or partly drawn anew?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparse_hf.moe.targets import Target
from sparse_hf.storage.pieces import (
    NUMBER_BYTES,
    CopyBytes,
    CopyColumns,
    DrawNormal,
    Piece,
    RedrawLines,
    Term,
    WeightedSum,
)
from sparse_hf.storage.tensor_headers import StoredTensor


@dataclass(frozen=True)
class ExpertInit:
    """How each expert begins; by default as a copy of the whole FFN.

    Raises:
        ValueError: a value is out of range, or `drop` is combined with what the paper does not combine it with.
    """

    granularity: int = field(
        default=1,
        metadata={
            "help": "Parts that each copy is cut into; `experts` counts copies, `top_k` parts. The parts of a copy "
            "have equal router rows, so that they are chosen together (virtual groups, He et al. 2024). With "
            "`experts` = 1 the FFN is split among its parts as in LLaMA-MoE, which changes the function."
        },
    )
    shared_half: bool = field(
        default=False,
        metadata={
            "help": "One half of the FFN becomes the shared expert for every token, copies of the other are routed."
        },
    )
    scale: Literal["down", "spread"] = field(
        default="down",
        metadata={
            "help": "Parts must count `granularity` times: 'down' multiplies their down matrix, exact for powers of "
            "two; 'spread' multiplies all three by its cube root (He et al. 2024), which gated FFNs do not survive "
            "unchanged."
        },
    )
    drop: float = field(
        default=0.0,
        metadata={
            "help": "Drop-Upcycling (Nakamura et al. 2025): the fraction of each expert's neurons that is drawn anew; "
            "the same neurons in gate, up and down."
        },
    )
    noise_std: float = field(default=0.0, metadata={"help": "Standard deviation of noise added to every expert."})

    def __post_init__(self) -> None:
        if type(self.granularity) is not int or self.granularity < 1:
            raise ValueError(f"`granularity` must be 1 or more, got {self.granularity!r}.")
        if self.scale not in ("down", "spread"):
            raise ValueError(f"`scale` must be 'down' or 'spread', got {self.scale!r}.")
        if not 0 <= self.drop < 1:
            raise ValueError(f"`drop` must be in [0, 1), got {self.drop!r}: 0.5 draws half of the neurons anew.")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"`noise_std` must be 0 or more, got {self.noise_std!r}.")
        if self.drop and (self.granularity > 1 or self.shared_half or self.noise_std):
            raise ValueError(
                "`drop` draws neurons of whole copies anew: leave `granularity`, `shared_half` and `noise_std` out."
            )


@dataclass(frozen=True)
class Cut:
    """The numbers that follow from an `ExpertInit` for one FFN.

    Attributes:
        parts: experts of the mixture, all copies' parts.
        width: neurons of an expert.
        first: the first neuron that is routed; those before it are the shared expert's.
        shared: neurons of the shared expert; 0 if there is none.
        shared_parts: the same in experts' widths, where the target counts so.
    """

    parts: int
    width: int
    first: int
    shared: int
    shared_parts: int


def cut_of(init: ExpertInit, target: Target, neurons: int, experts: int, top_k: int) -> Cut:
    """What the FFN's `neurons` are divided into.

    Raises:
        ValueError: they do not divide, the target has no shared expert, or `top_k` breaks up groups.
    """
    parts = experts * init.granularity
    if parts < 2:
        raise ValueError(f"`experts` must be 2 or more, got {experts}; or 1 with a `granularity` that splits the FFN.")
    if not 1 <= top_k <= parts:
        raise ValueError(f"`top_k` must be between 1 and the {parts} experts, got {top_k}.")
    if experts > 1 and top_k % init.granularity:
        raise ValueError(
            f"`top_k` must be a multiple of the granularity, so that tokens choose whole copies: {init.granularity} "
            f"costs as much as the dense FFN, got {top_k}."
        )
    first = neurons // 2 if init.shared_half else 0
    routed = neurons - first
    if routed % init.granularity or (init.shared_half and neurons % 2):
        shape = "half of them in " if init.shared_half else ""
        raise ValueError(
            f"The FFN's {neurons} neurons must divide into {shape}{init.granularity} equal parts: choose another "
            "`granularity`."
        )
    width, shared = routed // init.granularity, target.shared
    if init.shared_half and shared is None:
        raise ValueError(f"`shared_half` needs a target with a shared expert, {target.model_type} has none.")
    if shared is None:
        return Cut(parts, width, first, 0, 0)
    if not init.shared_half:
        return Cut(parts, width, first, shared.idle_neurons(neurons, width), 1)
    if shared.width is None and shared.count is None and first != width:
        raise ValueError(
            f"The shared expert of {target.model_type} is as wide as any other, so `shared_half` needs `granularity` "
            f"1, got {init.granularity}."
        )
    return Cut(parts, width, first, first, init.granularity)


def changes_function(init: ExpertInit, experts: int) -> str | None:
    """Why the mixture does not compute what the dense model does; None if it does."""
    if init.drop:
        return f"{init.drop:.0%} of each expert's neurons are drawn anew"
    if init.noise_std:
        return "noise is added to the experts"
    if experts == 1:
        return "each token passes some parts of the FFN only"
    if init.scale == "spread" and init.granularity > 1:
        return "the scale is spread over the three matrices, between which there is a product"
    return None


def factor_of(init: ExpertInit, experts: int, top_k: int, matrix: str) -> float:
    """What a matrix of an expert is multiplied by, since the routing weights of the chosen parts sum to 1.

    A split (`experts` = 1) multiplies by `top_k`, so that the chosen parts count as in the dense FFN. LLaMA-MoE's code
    multiplies by parts / top_k, which is the same at its 16 parts of which 4 are chosen.
    """
    total = top_k if experts == 1 else init.granularity
    if init.scale == "spread":
        return total ** (1 / 3)
    return total if matrix == "down_proj" else 1.0


def neurons_of(stored: StoredTensor, matrix: str, first: int, count: int) -> CopyBytes | CopyColumns:
    """The bytes of neurons `first` to `first + count`: rows of gate and up, columns of down."""
    rows, columns = stored.shape
    if matrix == "down_proj":
        if count == columns:
            return CopyBytes(stored.file, stored.offset, stored.length)
        row = stored.length // rows
        return CopyColumns(stored.file, stored.offset + first * row // columns, rows, row, count * row // columns)
    row = stored.length // rows
    return CopyBytes(stored.file, stored.offset + first * row, count * row)


def expert_piece(
    ffn: Mapping[str, StoredTensor], matrix: str, init: ExpertInit, cut: Cut, part: int, factor: float, key: str
) -> Piece:
    """The bytes of one matrix of one expert.

    Args:
        part: which of a copy's parts, in [0, granularity).
        key: of the random numbers, different for every expert of every layer.

    Raises:
        ValueError: numbers must be computed with in a dtype that is only copied.
    """
    stored = ffn[matrix]
    piece = neurons_of(stored, matrix, cut.first + part * cut.width, cut.width)
    computed = init.drop or init.noise_std or factor != 1
    if computed and stored.dtype not in NUMBER_BYTES:
        raise ValueError(
            f"Experts that are more than copies are made in {', '.join(NUMBER_BYTES)}, got {stored.dtype}: convert "
            "the checkpoint first."
        )
    if init.drop:
        along = "columns" if matrix == "down_proj" else "rows"
        return RedrawLines(piece, stored.dtype, stored.shape, along, init.drop, key, f"{key}/{matrix}")
    return scaled(piece, stored.dtype, factor, init.noise_std, f"{key}/{matrix}")


def scaled(piece: CopyBytes | CopyColumns, dtype: str, factor: float, noise_std: float = 0.0, key: str = "") -> Piece:
    """The piece times a factor, with noise; itself where neither changes anything."""
    if factor == 1 and not noise_std:
        return piece
    terms = (Term(factor, piece, dtype),)
    if noise_std:
        count = piece.length // NUMBER_BYTES[dtype]
        terms += (Term(1.0, DrawNormal(count, noise_std, "F32", key), "F32"),)
    return WeightedSum(terms, dtype)
