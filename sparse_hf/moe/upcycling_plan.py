"""What does every tensor of the mixture of experts consist of? Decided from headers alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sparse_hf.moe.pairs import Pair
from sparse_hf.storage.shard_plan import CopyBytes, DrawNormal, FillZeros, PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


DRAWN_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Router:
    """How routers begin: `std` 0 is zeros."""

    std: float = 0.02
    seed: int = 0


def plan_tensors(
    headers: Mapping[str, StoredTensor], pair: Pair, layers: frozenset[int], experts: int, router: Router
) -> list[PlannedTensor]:
    """Every tensor of the target, in the order of the source: FFN matrices become experts, everything else is copied.

    Args:
        headers: tensors of the dense checkpoint.
        layers: which layers become mixtures.

    Raises:
        ValueError: the checkpoint does not hold what its architecture needs, or holds something unknown in an FFN.
    """
    matrix = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(pair.matrices)})\.weight")
    planned, found = [], set()
    for name, stored in headers.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that old checkpoints hold and no model reads
        match = matrix.fullmatch(name)
        layer = int(match[1]) if match else None
        if layer is None and re.fullmatch(r"model\.layers\.\d+\.mlp\..*", name):
            raise ValueError(f"An FFN must consist of {', '.join(pair.matrices)}, but the checkpoint holds `{name}`.")
        if layer not in layers:
            planned.append(_copy(name, stored))
            continue
        found.add((layer, match[2]))
        if match[2] == next(iter(pair.matrices)):
            planned.append(_router(pair, layer, stored, experts, router))
        for expert in range(experts):
            renamed = pair.expert.format(layer=layer, expert=expert, matrix=pair.matrices[match[2]])
            planned.append(_copy(renamed, stored))
    missing = sorted({(layer, one) for layer in layers for one in pair.matrices} - found)
    if missing:
        layer, one = missing[0]
        raise ValueError(
            f"The checkpoint must hold the FFN of every layer, but `model.layers.{layer}.mlp.{one}.weight` is missing:"
            " it is incomplete, or its config belongs to another."
        )
    return planned


def _copy(name: str, stored: StoredTensor) -> PlannedTensor:
    return PlannedTensor(name, stored.dtype, stored.shape, (CopyBytes(stored.file, stored.offset, stored.length),))


def _router(pair: Pair, layer: int, gate: StoredTensor, experts: int, router: Router) -> PlannedTensor:
    """A row of the hidden size per expert; `gate` is (neurons, hidden)."""
    dtype = gate.dtype
    if dtype not in DRAWN_DTYPES:
        raise ValueError(f"Routers are made in {', '.join(DRAWN_DTYPES)}, got FFNs in {dtype}: convert them.")
    hidden = gate.shape[1]
    count = experts * hidden
    if router.std == 0:
        piece = FillZeros(count * (4 if dtype == "F32" else 2))
    else:
        piece = DrawNormal(count, router.std, dtype, f"{router.seed}/router/{layer}")
    return PlannedTensor(pair.router.format(layer=layer), dtype, (experts, hidden), (piece,))
