"""What does every tensor of the mixture of experts consist of? Decided from headers alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from sparse_hf.moe.pairs import Pair
from sparse_hf.moe.targets import MATRICES, Target
from sparse_hf.storage.pieces import NUMBER_BYTES, CopyBytes, DrawNormal, FillZeros
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import DTYPE_BITS, StoredTensor


FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(.*)")


@dataclass(frozen=True)
class Router:
    """How routers begin: `std` 0 is zeros."""

    std: float = 0.02
    seed: int = 0


def split_rows(headers: Mapping[str, StoredTensor], pair: Pair, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """The headers in Llama's names, weights such as Phi-3's `qkv_proj` as the several tensors that their rows are.

    Rows lie one after the other on disk, so each part is a tensor of the same file further on.

    Raises:
        ValueError: the rows do not divide as the config says.
    """
    found = {}
    for name, stored in headers.items():
        fused = next((one for one in pair.splits if name.endswith(f".{one}.weight")), None)
        if fused is None:
            found[name] = stored
            continue
        shares = [share if isinstance(share, int) else getattr(config, share) for _, share in pair.splits[fused]]
        if len(stored.shape) != 2 or not stored.shape[0] or stored.shape[0] % sum(shares):
            raise ValueError(f"The rows of `{name}` must divide as {shares}, got {list(stored.shape)}.")
        before = 0
        for (part, _), share in zip(pair.splits[fused], shares, strict=True):
            whole = name.replace(fused, part)
            found[whole] = _rows(replace(stored, name=whole), before, stored.shape[0] // sum(shares) * share)
            before += found[whole].shape[0]
    return found


def plan_tensors(
    headers: Mapping[str, StoredTensor], target: Target, layers: frozenset[int], experts: int, router: Router
) -> list[PlannedTensor]:
    """Every tensor of the target, in the order of the source: FFNs become mixtures, everything else is copied.

    Args:
        headers: tensors of the dense checkpoint.
        layers: which layers become mixtures.

    Raises:
        ValueError: the checkpoint does not hold what its architecture needs, or holds something unknown in an FFN.
    """
    ffns = {layer: _ffn(headers, layer) for layer in sorted(layers)}
    planned, done = [], set()
    for name, stored in headers.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that old checkpoints hold and no model reads
        match = FFN.fullmatch(name)
        if match and match[2].removesuffix(".weight") not in MATRICES:
            raise ValueError(f"An FFN must consist of {', '.join(MATRICES)}, but the checkpoint holds `{name}`.")
        layer = int(match[1]) if match else None
        if layer not in layers:
            planned.append(_joined(name, stored.shape, [stored]))
        elif layer not in done:
            done.add(layer)
            planned += _mixture(ffns[layer], target, layer, experts, router)
    return planned


def _ffn(headers: Mapping[str, StoredTensor], layer: int) -> dict[str, StoredTensor]:
    names = {matrix: f"model.layers.{layer}.mlp.{matrix}.weight" for matrix in MATRICES}
    for name in names.values():
        if name not in headers:
            raise ValueError(
                f"The checkpoint must hold the FFN of every layer, but `{name}` is missing:"
                " it is incomplete, or its config belongs to another."
            )
    ffn = {matrix: headers[name] for matrix, name in names.items()}
    shapes = [ffn[matrix].shape for matrix in MATRICES]
    fits = len(shapes[0]) == 2 and 0 not in shapes[0] and shapes == [shapes[0], shapes[0], shapes[0][::-1]]
    if not fits or len({stored.dtype for stored in ffn.values()}) > 1:
        found = ", ".join(f"{stored.dtype} {list(stored.shape)}" for stored in ffn.values())
        raise ValueError(
            f"{', '.join(MATRICES)} of layer {layer} must be [neurons, hidden] twice and [hidden, neurons], of one "
            f"dtype, got {found}: the checkpoint is damaged or packed."
        )
    return ffn


def _mixture(
    ffn: dict[str, StoredTensor], target: Target, layer: int, experts: int, router: Router
) -> list[PlannedTensor]:
    """The router, the experts, and what the target wants beside them."""
    gate = ffn["gate_proj"]  # (neurons, hidden)
    sizes = {"experts": experts, "hidden": gate.shape[1]}
    planned = [_router(target.router.format(layer=layer), gate, experts, f"{router.seed}/router/{layer}", router.std)]
    for template, shape in target.zeros.items():
        shape = tuple(sizes.get(size, size) for size in shape)
        planned.append(_zeros(template.format(layer=layer), target.zeros_dtype or gate.dtype, shape))
    if target.shared is not None:
        names = {matrix: target.shared.name.format(layer=layer, matrix=matrix) for matrix in MATRICES}
        neurons = target.shared.neurons(gate.shape[0])
        for matrix in ("gate_proj", "up_proj"):
            part = _rows(ffn[matrix], 0, neurons)
            planned.append(_joined(names[matrix], part.shape, [part]))
        planned.append(_zeros(names["down_proj"], gate.dtype, (gate.shape[1], neurons)))
    for template, matrices in target.experts.items():
        parts = [ffn[matrix] for matrix in matrices]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if "{expert}" in template:
            names = [template.format(layer=layer, expert=expert) for expert in range(experts)]
            planned += [_joined(name, shape, parts) for name in names]
        else:
            planned.append(_joined(template.format(layer=layer), (experts, *shape), parts * experts))
    return planned


def _rows(stored: StoredTensor, first: int, count: int) -> StoredTensor:
    row = stored.length // stored.shape[0]
    return replace(stored, shape=(count, *stored.shape[1:]), offset=stored.offset + first * row, length=count * row)


def _joined(name: str, shape: tuple[int, ...], parts: list[StoredTensor]) -> PlannedTensor:
    pieces = tuple(CopyBytes(part.file, part.offset, part.length) for part in parts)
    return PlannedTensor(name, parts[0].dtype, shape, pieces)


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, dtype, shape, (FillZeros(math.prod(shape) * DTYPE_BITS[dtype] // 8),))


def _router(name: str, gate: StoredTensor, experts: int, key: str, std: float) -> PlannedTensor:
    """A row of the hidden size per expert."""
    dtype, shape = gate.dtype, (experts, gate.shape[1])
    if dtype not in NUMBER_BYTES:
        raise ValueError(f"Routers are made in {', '.join(NUMBER_BYTES)}, got FFNs in {dtype}: convert them.")
    if std == 0:
        return _zeros(name, dtype, shape)
    return PlannedTensor(name, dtype, shape, (DrawNormal(math.prod(shape), std, dtype, key),))
