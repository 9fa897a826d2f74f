"""What does every tensor of the mixture of experts consist of? Decided from headers alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig

from sparse_hf.moe.mixture_plan import Mixture, mixture_tensors
from sparse_hf.moe.pairs import Pair
from sparse_hf.moe.targets import MATRICES
from sparse_hf.storage.pieces import NUMBER_BYTES, CopyBytes, Piece, Term, WeightedSum
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(.*)")


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
            found[whole] = replace(stored, name=whole).rows(before, stored.shape[0] // sum(shares) * share)
            before += found[whole].shape[0]
    return found


def plan_tensors(
    headers: Mapping[str, StoredTensor],
    mixture: Mixture,
    layers: frozenset[int],
    branches: Sequence[Mapping[str, StoredTensor]] = (),
    average: bool = False,
) -> list[PlannedTensor]:
    """Every tensor of the target, in the order of the source: FFNs become mixtures, everything else is copied.

    Args:
        headers: tensors of the dense checkpoint.
        layers: which layers become mixtures.
        branches: tensors of models like the source, whose FFNs become the experts in turn, instead of the source's.
        average: whether everything else is the branches' mean, instead of the source's.

    Raises:
        ValueError: the checkpoint does not hold what its architecture needs, or holds something unknown in an FFN.
    """
    ffns = {layer: [_ffn(one, layer) for one in (headers, *branches)] for layer in sorted(layers)}
    planned, done = [], set()
    for name, stored in headers.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that old checkpoints hold and no model reads
        match = FFN.fullmatch(name)
        if match and match[2].removesuffix(".weight") not in MATRICES:
            raise ValueError(f"An FFN must consist of {', '.join(MATRICES)}, but the checkpoint holds `{name}`.")
        layer = int(match[1]) if match else None
        if layer not in layers:
            parts = [one[name] for one in branches] if average else [stored]
            planned.append(PlannedTensor(name, stored.dtype, stored.shape, (mean_of(parts),)))
        elif layer not in done:
            done.add(layer)
            planned += mixture_tensors(ffns[layer], mixture, layer)
    return planned


def check_branches(headers: Mapping[str, StoredTensor], branches: Sequence[Mapping[str, StoredTensor]]) -> None:
    """Refuse, with a ValueError, branches that do not hold the source's tensors in the source's shapes and dtypes."""
    for number, branch in enumerate(branches):
        for name in sorted(headers.keys() | branch.keys()):
            sides = [one.get(name) for one in (headers, branch)]
            found = [f"{side.dtype} {list(side.shape)}" if side else "missing" for side in sides]
            if found[0] != found[1]:
                raise ValueError(
                    f"All models must hold the same tensors, but `{name}` is {found[0]} in the source and {found[1]} "
                    f"in branch {number}: take models that were fine-tuned from one."
                )


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


def mean_of(parts: Sequence[StoredTensor]) -> Piece:
    """The bytes of one tensor, or the mean of several."""
    pieces = [CopyBytes(part.file, part.offset, part.length) for part in parts]
    if len(pieces) == 1:
        return pieces[0]
    dtype = parts[0].dtype
    if dtype not in NUMBER_BYTES:
        raise ValueError(f"Means are made in {', '.join(NUMBER_BYTES)}, got `{parts[0].name}` in {dtype}.")
    return WeightedSum(tuple(Term(1 / len(pieces), piece, dtype) for piece in pieces), dtype)
