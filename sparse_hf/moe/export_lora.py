"""Write a mixture whose experts were trained by low-rank factors as a checkpoint of its own, holding no model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_hf.moe.fingerprint import fingerprint
from sparse_hf.moe.memory_names import Place, expert_places, memory_name
from sparse_hf.moe.new_checkpoint import write_checkpoint
from sparse_hf.moe.plan_upcycling import COMPANIONS, SHARD_BYTES, WEIGHTS, UpcyclingPlan, plan_upcycling
from sparse_hf.moe.read_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    LowRank,
    as_dtype,
    float32_factors,
    read_adapter,
)
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.pieces import NUMBER_BYTES, AddLowRank, CopyBytes, CopyColumns, Piece
from sparse_hf.storage.shard_plan import PlannedTensor


@dataclass(frozen=True)
class Matrix:
    """A matrix among those that a parameter in memory holds; the parameter is of `together` experts."""

    place: Place
    shape: tuple[int, ...]
    together: int = 1


def export_merged(
    adapter: str | Path,
    destination: str | Path,
    source: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> bool:
    """Write the trained mixture natively: W_e = W + scaling B_e A_e for every expert, and routers that were trained.

    The adapter must be a plain LoRA of a model of `load_with_shared_experts`, with `expert_lora_targets` in its
    config; linear layers may be adapted too. Weights are read and written block by block and no model is held. Sums
    are made in float32 and rounded once to the dtype of the checkpoint, where PEFT computes in the model's dtype.
    Called again after a kill it goes on; the config is written last.

    Args:
        adapter: folder or Hub id of what PEFT's `save_pretrained`, or Trainer, saved.
        destination: a new folder.
        source: the dense checkpoint, if it has moved since; by default where the adapter says it is.
        max_shard_bytes: of one file.
        progress: show a bar.

    Returns:
        Whether the folder is complete; if not, other processes still write.

    Raises:
        FileNotFoundError: no such adapter or checkpoint.
        ValueError: the adapter is of another base, or of a kind that is not known to be W + scaling B A.
        FileExistsError: the destination holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    found = read_adapter(local_folder(adapter, [CONFIG_FILE, WEIGHTS_FILE]))
    plan = _plan(found, source or found.base, Path(destination))
    with float32_factors(found, plan.destination.absolute().parent) as ready:
        return write_checkpoint(
            plan.source,
            plan.destination,
            merged_tensors(plan, ready),
            plan.config.to_dict(),
            _description(plan, found),
            max_shard_bytes,
            progress,
        )


def merged_tensors(plan: UpcyclingPlan, adapter: Adapter) -> list[PlannedTensor]:
    """The tensors of the upcycling with all that the adapter (factors in float32) adds and replaces.

    Raises:
        ValueError: something in the adapter has no place in the model, or another shape.
    """
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    matrices = _matrices(plan, tensors)
    factors = _by_parameter(adapter, matrices)
    _check_whole(adapter, tensors, plan)
    if twice := adapter.whole.keys() & factors.keys():
        raise ValueError(f"`{min(twice)}` must be trained whole or by low rank, the adapter holds both.")
    merged = []
    for tensor in tensors:
        name = memory_name(tensor.name)
        if name in adapter.whole:
            merged.append(PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (_trained(adapter, tensor),)))
            continue
        pieces = [
            _added(piece, tensor, matrix, factors.get(matrix.place.parameter), adapter.scale)
            for piece, matrix in zip(tensor.pieces, matrices[tensor.name], strict=True)
        ]
        merged.append(PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tuple(pieces)))
    return merged


def _plan(adapter: Adapter, source: str | Path, destination: Path) -> UpcyclingPlan:
    """The upcycling that the adapter was trained on.

    Raises:
        ValueError: the source is another model.
    """
    folder = local_folder(source, ["config.json", *WEIGHTS, *COMPANIONS])
    if fingerprint(folder) != adapter.record["base"]:
        raise ValueError(
            f"The adapter in `{adapter.folder}` was trained on `{adapter.base}` as it was then, got `{source}`, whose "
            "tensors are not those. Give the checkpoint that it was trained on as `source`."
        )
    options = {name: value for name, value in adapter.record.items() if name != "base"}
    return plan_upcycling(folder, destination, **options)


def _matrices(plan: UpcyclingPlan, tensors: list[PlannedTensor]) -> dict[str, tuple[Matrix, ...]]:
    """Of every stored tensor, piece by piece; what is no expert's is one matrix in a parameter of its own."""
    target = plan.pair.target
    experts = getattr(plan.config, target.count)
    places = expert_places(target, plan.all_layers, experts)
    found = {}
    for tensor in tensors:
        if tensor.name in places:
            columns = tensor.shape[-1]
            rows = tensor.length // len(tensor.pieces) // columns // NUMBER_BYTES[tensor.dtype]
            found[tensor.name] = tuple(Matrix(place, (rows, columns), experts) for place in places[tensor.name])
        else:
            place = Place(memory_name(tensor.name), expert=0, part=0)
            found[tensor.name] = (Matrix(place, tensor.shape),) * len(tensor.pieces)
    return found


def _by_parameter(adapter: Adapter, matrices: Mapping[str, tuple[Matrix, ...]]) -> dict[str, LowRank]:
    """The factors of each parameter in memory; both of the experts' lie in one module, so shapes tell them apart.

    Raises:
        ValueError: factors that fit nothing.
    """
    shapes: dict[str, tuple[int, int, int]] = {}  # rows, columns, experts
    for matrix in (one for several in matrices.values() for one in several if len(one.shape) == 2):
        name, rows = matrix.place.parameter, (matrix.place.part + 1) * matrix.shape[0]
        shapes[name] = (max(rows, shapes.get(name, (0,))[0]), matrix.shape[1], matrix.together)
    found: dict[str, LowRank] = {}
    for module, several in adapter.factors.items():
        candidates = {name: shapes[name] for name in _parameters_of(module) if name in shapes}
        for pair in several:
            fitting = [name for name, shape in candidates.items() if _fits(pair, shape, adapter.rank)]
            if len(fitting) != 1 or fitting[0] in found:
                raise ValueError(
                    f"The adapter's factors for `{module}`, B {list(pair.left.shape)} and A {list(pair.right.shape)} "
                    f"of rank {adapter.rank}, must fit one of {candidates or 'none'} (rows, columns, experts): "
                    "it is of another base."
                )
            found[fitting[0]] = pair
    return found


def _parameters_of(module: str) -> tuple[str, ...]:
    return f"{module}.weight", f"{module}.gate_up_proj", f"{module}.down_proj"


def _fits(pair: LowRank, shape: tuple[int, int, int], rank: int) -> bool:
    rows, columns, experts = shape
    return pair.left.shape == (rows, rank * experts) and pair.right.shape == (rank * experts, columns)


def _check_whole(adapter: Adapter, tensors: list[PlannedTensor], plan: UpcyclingPlan) -> None:
    shapes = {memory_name(tensor.name): tensor.shape for tensor in tensors}
    for name, stored in adapter.whole.items():
        if shapes.get(name) != stored.shape:
            raise ValueError(
                f"`{name}` in the adapter is {list(stored.shape)}, but the model has "
                f"{list(shapes[name]) if name in shapes else 'no such weight'}: it is of another base."
            )
        if plan.config.tie_word_embeddings and name.startswith(("model.embed_tokens.", "lm_head.")):
            raise ValueError(f"`{name}` is tied to another weight, which PEFT unties: train other modules.")


def _trained(adapter: Adapter, tensor: PlannedTensor) -> Piece:
    return as_dtype(adapter.whole[memory_name(tensor.name)], tensor.dtype)


def _added(piece: Piece, tensor: PlannedTensor, matrix: Matrix, factors: LowRank | None, scale: float) -> Piece:
    """A matrix of the base plus what its factors add."""
    if factors is None:
        return piece
    (rows, columns), place = matrix.shape, matrix.place
    if not isinstance(piece, CopyBytes) or piece.length != rows * columns * NUMBER_BYTES[tensor.dtype]:
        raise ValueError(f"`{tensor.name}` is no matrix that is copied from the base, so nothing is added to it.")
    left, right, together = factors.left, factors.right, matrix.together
    rank = right.shape[0] // together
    return AddLowRank(
        base=piece,
        dtype=tensor.dtype,
        shape=(rows, columns),
        # Of B's rows for this matrix every `together`-th number, from the expert's on: (rows, rank).
        left=CopyColumns(
            left.file,
            left.offset + 4 * (place.part * rows * rank * together + place.expert),
            rows=rows * rank,
            row_bytes=4 * together,
            width=4,
        ),
        right=CopyBytes(right.file, right.offset + 4 * place.expert * rank * columns, 4 * rank * columns),
        scale=scale,
    )


def _description(plan: UpcyclingPlan, adapter: Adapter) -> dict[str, object]:
    return {
        "kind": "merged_mixture",
        "source_type": plan.pair.source,
        "target_type": plan.pair.target.model_type,
        "experts": adapter.record["experts"],
        "top_k": adapter.record["top_k"],
        "adapter": {"rank": adapter.rank, "scale": adapter.scale, "whole": len(adapter.whole)},
    }
