"""The way back: one expert, or the experts' average, becomes the FFN of the dense architecture."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparse_hf.moe.dense_sibling import check_config, check_tensors, dense_config, pair_of_mixture
from sparse_hf.moe.expert_average import weighted_mean
from sparse_hf.moe.new_checkpoint import read_origin, write_checkpoint
from sparse_hf.moe.pairs import Pair
from sparse_hf.moe.plan_upcycling import COMPANIONS, SHARD_BYTES, WEIGHTS
from sparse_hf.moe.read_mixture import StoredMixture, read_mixture
from sparse_hf.moe.targets import MATRICES
from sparse_hf.moe.usage import usage_of
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.piece_bytes import SourceFiles, piece_blocks
from sparse_hf.storage.pieces import CopyBytes
from sparse_hf.storage.shard_plan import PlannedTensor


def densify(
    source: str | Path,
    destination: str | Path,
    expert: str | int = "average",
    usage: Mapping[int, Tensor] | None = None,
    target: str | None = None,
    ignore_shared: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> bool:
    """Write the dense model whose FFNs are the mixture's experts: their average, or one and the same of each layer.

    The reverse of `upcycle`: of a mixture whose experts are still copies it gives the dense checkpoint back, every
    tensor byte for byte. Of a trained one it makes a start for further training, not the same function: each token had
    its own experts. Routers, and what stands beside them, are left out. Layers that are dense already stay. Reads,
    writes, resumes and completes the folder as `upcycle` does, in constant memory.

    Args:
        source: folder or Hub id of a mixture of one of the architectures in `read_mixture.TARGETS`.
        destination: a new folder.
        expert: "average", or the number of one.
        usage: per layer the weights of the average, such as `expert_usage(...).counts`; of layers without any use, and
            where it is not given, a plain mean is taken.
        target: `model_type` of the dense model. By default the one that the mixture was upcycled from, as its
            `sparse_hf.json` says, or the only one there is.
        ignore_shared: leave a shared expert out although it adds something. One that adds nothing, because its down
            matrix is still all zeros, is left out anyway.
        max_shard_bytes: of one file.
        progress: show a bar.

    Returns:
        Whether the folder is complete; if not, other processes still write.

    Raises:
        FileNotFoundError: no such checkpoint, or a shard is missing.
        ValueError: `read_mixture` refuses it; arguments do not fit it; or the dense model cannot say what it says: a
            shared expert, weights that do not sum to 1, experts that are parts of an FFN, a window, biases, ...
        FileExistsError: the destination holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    folder = local_folder(source, ["config.json", "sparse_hf.json", *WEIGHTS, *COMPANIONS])
    mixture, origin = read_mixture(folder), read_origin(folder)
    pair = pair_of_mixture(mixture, target, origin)
    _check_whole(origin)
    check_config(mixture, pair)
    weights = _weights(mixture, expert, usage)
    if not ignore_shared:
        _check_shared(mixture)
    config = dense_config(mixture, pair)
    tensors = _join(_llama_tensors(mixture, weights), pair)
    check_tensors(tensors, config)
    description = {
        "kind": "densified_mixture",
        "source_type": mixture.target.model_type,
        "target_type": pair.source,
        "expert": expert,
    }
    return write_checkpoint(
        folder, Path(destination), tensors, config.to_dict(), description, max_shard_bytes, progress
    )


def _check_whole(origin: Mapping[str, object]) -> None:
    init = origin.get("init", {})
    if init.get("granularity", 1) != 1 or init.get("shared_half"):
        raise ValueError(
            "The experts of this mixture are parts of an FFN, and neither one of them nor their average is one. "
            "Upcycle without `granularity` and `shared_half` to be able to come back."
        )


def _weights(
    mixture: StoredMixture, expert: str | int, usage: Mapping[int, Tensor] | None
) -> dict[int, dict[int, float]]:
    """Per layer the experts that count, and how much."""
    if expert == "average":
        used = usage_of(mixture, usage) if usage is not None else {}
        return {layer: dict(enumerate(used.get(layer, [1.0] * mixture.experts))) for layer in mixture.layers}
    if type(expert) is not int or not 0 <= expert < mixture.experts:
        raise ValueError(f"`expert` must be 'average' or a number from 0 to {mixture.experts - 1}, got {expert!r}.")
    if usage is not None:
        raise ValueError(f"`usage` weighs an average, and `expert` is {expert}: leave one of them out.")
    return {layer: {expert: 1.0} for layer in mixture.layers}


def _check_shared(mixture: StoredMixture) -> None:
    """A dense FFN has no place for a shared expert, unless that adds exactly 0."""
    with SourceFiles() as sources:
        for layer, one in mixture.layers.items():
            down = one.shared.get("down_proj")
            if down is None:
                continue
            piece = CopyBytes(down.file, down.offset, down.length)
            if any(block.count(0) != len(block) for block in piece_blocks(piece, sources)):
                raise ValueError(
                    f"The shared expert of layer {layer} must add nothing, since a dense model has no place for it, "
                    f"but `{down.name}` is not all zeros. Set `ignore_shared` to leave it out."
                )


def _llama_tensors(mixture: StoredMixture, weights: Mapping[int, Mapping[int, float]]) -> list[PlannedTensor]:
    """Every tensor of the dense model in Llama's names, in the order of the source."""
    names = {layer: one.routed_names() | one.shared_names() for layer, one in mixture.layers.items()}
    owner = {name: layer for layer, ours in names.items() for name in ours}
    planned, done = [], set()
    for name, stored in mixture.headers.items():
        if name not in owner:
            piece = CopyBytes(stored.file, stored.offset, stored.length)
            planned.append(PlannedTensor(name, stored.dtype, stored.shape, (piece,)))
        elif (layer := owner[name]) not in done:
            done.add(layer)
            for matrix in MATRICES:
                parts = [mixture.layers[layer].experts[expert][matrix] for expert in weights[layer]]
                mean = weighted_mean(parts, list(weights[layer].values()))
                dense = f"model.layers.{layer}.mlp.{matrix}.weight"
                planned.append(PlannedTensor(dense, parts[0].dtype, parts[0].shape, (mean,)))
    return planned


def _join(tensors: list[PlannedTensor], pair: Pair) -> list[PlannedTensor]:
    """The tensors in the family's own names, several as one where it has them so (Phi-3's `qkv_proj`)."""
    parts = {part: joined for joined, several in pair.splits.items() for part, _ in several}
    by_name = {tensor.name: tensor for tensor in tensors}
    planned, done = [], set()
    for tensor in tensors:
        part = next((one for one in parts if tensor.name.endswith(f".{one}.weight")), None)
        if part is None:
            planned.append(tensor)
            continue
        name = tensor.name.replace(part, parts[part])
        if name in done:
            continue
        done.add(name)
        names = [name.replace(parts[part], one) for one, _ in pair.splits[parts[part]]]
        if missing := [one for one in names if one not in by_name]:
            raise ValueError(f"`{name}` is made of {', '.join(names)}, but `{missing[0]}` is missing.")
        several = [by_name[one] for one in names]
        rows = sum(one.shape[0] for one in several)
        pieces = tuple(piece for one in several for piece in one.pieces)
        planned.append(PlannedTensor(name, tensor.dtype, (rows, *tensor.shape[1:]), pieces))
    return planned
