"""Which weights stay: exactly as many as asked, the largest scores, over all tensors at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_hf.algorithms.block_scan import Piece, count_kept
from sparse_hf.algorithms.global_selection import Model, keep_top
from sparse_hf.algorithms.shard_layout import ShardLayout


def keep_largest(
    scores: Sequence[Tensor],
    num_keep: int,
    *,
    candidates: Sequence[Tensor] | None = None,
    min_per_tensor: int = 1,
    absolute: bool = False,
    names: Sequence[str] | None = None,
    shards: ShardLayout | None = None,
) -> list[Tensor]:
    """Keep exactly the `num_keep` largest scores of all tensors together.

    Ties are broken by position: earlier tensors first, then lower flat indices. The result depends neither on the
    device nor on how the tensors are sharded. Unlike `torch.nn.utils.prune.global_unstructured`, which leaves ties to
    `topk`, the count and the mask are the same everywhere, and no copy of all scores is made: the extra memory is the
    masks (1 byte per weight) and about 1 % of the values (more when many tie). A non-contiguous tensor is copied while
    it is read.

    Args:
        scores: floating tensors of any shapes and devices; fp16 and bf16 are compared as fp32. With `shards`, the
            pieces that this rank holds.
        num_keep: how many weights stay, over all tensors (and ranks).
        candidates: bool masks of the scores' shapes and devices; only where they are True may a weight stay. Pass the
            earlier masks to get nested ones. All scores must be finite, whether candidates or not.
        min_per_tensor: keep at least this many of each tensor (or all its candidates, if it has fewer): its largest
            ones are kept and the rest is chosen globally. Changes nothing where no tensor falls below. 0 switches off.
        absolute: rank by |score| without a copy of the scores; pass the weights themselves for magnitude pruning.
        names: names of the (whole) tensors for error messages.
        shards: for pieces of tensors; every rank then calls this function with otherwise the same arguments.

    Returns:
        bool masks, True = kept, in the shapes and on the devices of `scores`.

    Raises:
        ValueError: scores that are not floating or not finite, masks that do not match, `num_keep` above the number of
            candidates or below what `min_per_tensor` needs, pieces that do not make up the whole tensors.
    """
    scores = list(scores)
    _check_tensors(scores, candidates, min_per_tensor)
    layout = shards or ShardLayout.single_process(scores)
    layout.check(scores)
    names = _names(names, layout)
    dtype, num_candidates = _agree(scores, candidates, layout, names)
    floors = [min(min_per_tensor, count) for count in num_candidates]
    _check_count(num_keep, sum(num_candidates), sum(floors), min_per_tensor)

    model = Model(layout.numels, names, dtype, layout.all_reduce_sum)
    pieces = _pieces(scores, candidates, layout, dtype, absolute)
    _keep_with_floors(pieces, num_keep, num_candidates, floors, model)
    return [piece.mask for piece in pieces]


def _keep_with_floors(
    pieces: Sequence[Piece], num_keep: int, num_candidates: Sequence[int], floors: Sequence[int], model: Model
) -> None:
    """Select globally; where a tensor falls below its floor, fix its best `floor` and select again among the others.

    The threshold of the others can only rise, so a fixed tensor would not get more than its floor either way, and the
    result is the one described in `keep_largest`.
    """
    free = list(range(len(floors)))
    while True:
        chosen = [piece for piece in pieces if piece.tensor in free]
        keep_top(chosen, num_keep, free, sum(num_candidates[tensor] for tensor in free), model)
        if not any(floors):
            return
        kept = [0] * len(floors)
        for piece in chosen:
            kept[piece.tensor] += count_kept(piece.mask)
        kept = model.sum(*kept)
        starved = [tensor for tensor in free if kept[tensor] < floors[tensor]]
        if not starved:
            return
        for tensor in starved:
            alone = [piece for piece in pieces if piece.tensor == tensor]
            keep_top(alone, floors[tensor], [tensor], num_candidates[tensor], model)
            num_keep -= floors[tensor]
            free.remove(tensor)


def _pieces(
    scores: Sequence[Tensor],
    candidates: Sequence[Tensor] | None,
    layout: ShardLayout,
    dtype: np.dtype,
    absolute: bool,
) -> list[Piece]:
    offsets = [0]
    for numel in layout.numels:
        offsets.append(offsets[-1] + numel)
    return [
        Piece(
            scores=score,
            candidates=None if candidates is None else candidates[i],
            mask=torch.empty(score.shape, dtype=torch.bool, device=score.device),
            tensor=layout.tensors[i],
            start=offsets[layout.tensors[i]] + layout.starts[i],
            dtype=dtype,
            absolute=absolute,
        )
        for i, score in enumerate(scores)
    ]


def _agree(
    scores: Sequence[Tensor], candidates: Sequence[Tensor] | None, layout: ShardLayout, names: Sequence[str]
) -> tuple[np.dtype, list[int]]:
    """The dtype in which all ranks compare, and the number of candidates of every whole tensor."""
    tensors = len(layout.numels)
    held, allowed = [0] * tensors, [0] * tensors
    for i, (score, tensor) in enumerate(zip(scores, layout.tensors, strict=True)):
        held[tensor] += score.numel()
        allowed[tensor] += score.numel() if candidates is None else count_kept(candidates[i])
    double = any(score.dtype == torch.float64 for score in scores)
    double, *counts = layout.all_reduce_sum(torch.tensor([int(double), *held, *allowed])).tolist()
    for name, count, numel in zip(names, counts[:tensors], layout.numels, strict=True):
        if count != numel:
            raise ValueError(
                f"The ranks must hold each weight exactly once, got {count} weights of {numel} for {name}: "
                "reduce over one replica, and leave out padding."
            )
    return np.dtype(np.float64 if double else np.float32), counts[tensors:]


def _names(names: Sequence[str] | None, layout: ShardLayout) -> list[str]:
    if names is None:
        return [f"tensor {position}" for position in range(len(layout.numels))]
    if len(names) != len(layout.numels):
        raise ValueError(f"`names` must name every tensor, got {len(names)} for {len(layout.numels)}: match them.")
    return [f"`{name}`" for name in names]


def _check_tensors(scores: Sequence[Tensor], candidates: Sequence[Tensor] | None, min_per_tensor: int) -> None:
    for position, score in enumerate(scores):
        if not score.is_floating_point():
            raise ValueError(
                f"`scores` must be floating, got {score.dtype} at position {position}: pass `score.float()`."
            )
    if min_per_tensor < 0:
        raise ValueError(f"`min_per_tensor` must be at least 0, got {min_per_tensor}: 0 switches the minimum off.")
    if candidates is None:
        return
    if len(candidates) != len(scores):
        raise ValueError(
            f"`candidates` must match `scores`, got {len(candidates)} for {len(scores)}: pass one per tensor."
        )
    for position, (score, allowed) in enumerate(zip(scores, candidates, strict=True)):
        if allowed.dtype != torch.bool or allowed.shape != score.shape or allowed.device != score.device:
            raise ValueError(
                f"`candidates` must be bool of shape {tuple(score.shape)} on {score.device}, got {allowed.dtype} of "
                f"shape {tuple(allowed.shape)} on {allowed.device} at position {position}: pass their masks."
            )


def _check_count(num_keep: int, num_candidates: int, minimum: int, min_per_tensor: int) -> None:
    if not 0 <= num_keep <= num_candidates:
        raise ValueError(
            f"`num_keep` must be in 0..{num_candidates}, the number of candidates, got {num_keep}: "
            "masks that are nested in earlier ones can only lose weights."
        )
    if num_keep < minimum:
        raise ValueError(
            f"`num_keep` must be at least {minimum} to keep `min_per_tensor={min_per_tensor}` in every tensor, "
            f"got {num_keep}: lower the sparsity or pass `min_per_tensor=0`."
        )
