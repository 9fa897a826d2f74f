"""How do routers begin: with zeros, normal numbers, or rows fitted to samples?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparse_hf.storage.piece_bytes import SourceFiles, encode, piece_blocks
from sparse_hf.storage.pieces import NUMBER_BYTES, DrawNormal, FillZeros, GivenBytes
from sparse_hf.storage.shard_plan import PlannedTensor


@dataclass(frozen=True)
class Router:
    """How routers begin.

    Attributes:
        std: of normal numbers; 0 is zeros. Where rows are given it is noise on them, as a fraction of their root mean
            square: copies with one row would be chosen together for ever.
        rows: per layer, the rows that `fit_routers` found, float32 (domains, hidden); copy e of the FFN gets row e
            modulo their number.
    """

    std: float = 0.02
    seed: int = 0
    rows: Mapping[int, np.ndarray] | None = None


def router_tensor(
    name: str, layer: int, router: Router, dtype: str, hidden: int, copies: int, parts: int
) -> PlannedTensor:
    """A row of the hidden size per expert.

    Args:
        copies: of the FFN.
        parts: that each is cut into: experts with equal rows, so that they are chosen together. An FFN that is split
            (one copy) has a row of its own for each part.

    Raises:
        ValueError: zeros, where rows must tell copies apart; a dtype that is only copied; given rows do not fit.
    """
    if dtype not in NUMBER_BYTES:
        raise ValueError(f"Routers are made in {', '.join(NUMBER_BYTES)}, got FFNs in {dtype}: convert them.")
    count, repeats = (copies, parts) if copies > 1 else (parts, 1)
    shape, key = (copies * parts, hidden), f"{router.seed}/router/{layer}"
    if router.rows is None and router.std == 0:
        if repeats > 1:
            raise ValueError("With `granularity` routers must tell copies apart, got zeros: set `router_std` above 0.")
        return PlannedTensor(name, dtype, shape, (FillZeros(count * hidden * NUMBER_BYTES[dtype]),))
    if router.rows is None and repeats == 1:
        return PlannedTensor(name, dtype, shape, (DrawNormal(count * hidden, router.std, dtype, key),))
    rows = _normal_rows(DrawNormal(count * hidden, router.std, "F32", key)).reshape(count, hidden)
    if router.rows is not None:
        given = _given_rows(router.rows, layer, hidden)
        rows = rows * np.sqrt(np.square(given).mean()) + given[np.arange(count) % len(given)]
    return PlannedTensor(name, dtype, shape, (GivenBytes(encode(np.repeat(rows, repeats, axis=0), dtype)),))


def _normal_rows(piece: DrawNormal) -> np.ndarray:
    with SourceFiles() as nothing:
        return np.frombuffer(b"".join(piece_blocks(piece, nothing)), "<f4")


def _given_rows(rows: Mapping[int, np.ndarray], layer: int, hidden: int) -> np.ndarray:
    if layer not in rows or rows[layer].ndim != 2 or rows[layer].shape[1] != hidden or not len(rows[layer]):
        found = "nothing" if layer not in rows else list(rows[layer].shape)
        raise ValueError(f"Router rows of layer {layer} must have the shape [domains, {hidden}], got {found}.")
    return rows[layer].astype(np.float32)
