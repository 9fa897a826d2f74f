"""What do the experts of a generic mixture consist of when it is written?"""

from collections.abc import Mapping, Sequence

from sparse_hf.moe.expert_init import ExpertInit, scaled
from sparse_hf.moe.generic_families import StoredFeedForward
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.storage.pieces import NUMBER_BYTES, CopyBytes, FillZeros, Piece, RedrawLines
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


def check_init(init: ExpertInit) -> None:
    """Raise ValueError if experts would be cut into parts, which mixtures of ours cannot be."""
    if init.granularity > 1 or init.shared_half or init.scale != "down":
        raise ValueError(
            "Experts of a mixture of ours are whole FFNs: leave `granularity`, `shared_half` and `scale` out."
        )


def stored_ffn(headers: Mapping[str, StoredTensor], table: StoredFeedForward, where: str) -> dict[str, StoredTensor]:
    """The tensors of the FFN of the layer named `where`, by their names in it, checked.

    Raises:
        ValueError: one is missing, or they do not fit together.
    """
    kinds = ("weight", "bias") if table.biased else ("weight",)
    names = [f"{part}.{kind}" for part in (*table.up, table.down) for kind in kinds]
    for name in names:
        if f"{where}.{name}" not in headers:
            raise ValueError(
                f"The checkpoint must hold the FFN of every layer, but `{where}.{name}` is missing:"
                " it is incomplete, or its config belongs to another."
            )
    ffn = {name: headers[f"{where}.{name}"] for name in names}
    shapes = {name: stored.shape for name, stored in ffn.items()}
    down = shapes[f"{table.down}.weight"]
    hidden, neurons = (down[::-1] if table.transposed else down) if len(down) == 2 else (0, 0)
    wanted = {f"{part}.weight": down[::-1] for part in table.up} | {f"{table.down}.weight": down}
    if table.biased:
        wanted |= {f"{part}.bias": (neurons,) for part in table.up} | {f"{table.down}.bias": (hidden,)}
    dtypes = {stored.dtype for stored in ffn.values()}
    if shapes != wanted or 0 in (hidden, neurons) or len(dtypes) > 1 or not dtypes <= set(NUMBER_BYTES):
        found = ", ".join(f"{name} {stored.dtype} {list(stored.shape)}" for name, stored in ffn.items())
        raise ValueError(
            f"The FFN `{where}` must have weights and biases that fit together, of one dtype of "
            f"{', '.join(NUMBER_BYTES)}, got {found}: the checkpoint is damaged or packed."
        )
    return ffn


def expert_tensors(
    ffns: Sequence[Mapping[str, StoredTensor]], table: StoredFeedForward, where: str, layer: int, mixture: Mixture
) -> list[PlannedTensor]:
    """Guard and stacks of experts; a gate lies above its up matrix, expert by expert.

    Args:
        ffns: of the source, then of the branches if there are any, whose FFNs become the experts in turn.
        where: name of the list of layers.
    """
    # In the dense weight's place, so that stock classes refuse the checkpoint.
    planned = [PlannedTensor(f"{where}.{layer}.{table.down}.weight", "U8", (1,), (FillZeros(1),))]
    block, experts, copied = f"{where}.{layer}.{table.block}", mixture.experts, ffns[1:] or ffns
    for stack, linears in (
        ("gate_up_proj" if len(table.up) > 1 else "up_proj", table.up),
        ("down_proj", (table.down,)),
    ):
        for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + table.biased]:
            pieces = []
            for expert in range(experts):
                key, ffn = f"{mixture.router.seed}/expert/{layer}/{expert}", copied[expert % len(copied)]
                pieces += [_piece(ffn[f"{one}.{kind}"], table, one, mixture.init, key) for one in linears]
            stored = ffns[0][f"{linears[0]}.{kind}"]
            shape = (experts, len(linears) * stored.shape[0], *stored.shape[1:])
            planned.append(PlannedTensor(f"{block}.experts.{stack}{end}", stored.dtype, shape, tuple(pieces)))
    return planned


def _piece(stored: StoredTensor, table: StoredFeedForward, linear: str, init: ExpertInit, key: str) -> Piece:
    """The bytes of one weight or bias of one expert.

    A neuron that is drawn anew gets another bias too, from the drawn neurons' mean and deviation; the bias of down
    belongs to no neuron and stays. (The paper's models have no biases.) Noise is added to weights only.
    """
    piece, down = CopyBytes(stored.file, stored.offset, stored.length), linear == table.down
    weight = len(stored.shape) == 2
    if init.drop and (weight or not down):
        # A bias is a matrix of one column; up of Conv1D is (hidden, neurons).
        shape = stored.shape if weight else (stored.shape[0], 1)
        along = "columns" if weight and down != table.transposed else "rows"
        kind = "weight" if weight else "bias"
        return RedrawLines(piece, stored.dtype, shape, along, init.drop, key, f"{key}/{linear}.{kind}")
    return scaled(piece, stored.dtype, 1.0, init.noise_std if weight else 0.0, f"{key}/{linear}")
