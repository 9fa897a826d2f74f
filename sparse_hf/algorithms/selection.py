"""Which weights stay: exactly as many as asked, the largest scores, over all tensors at once or in each tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_hf.algorithms.block_scan import Piece, count_kept
from sparse_hf.algorithms.global_selection import Model, keep_top
from sparse_hf.algorithms.joint_sums import Summing, added_up, each_added_up, summed, together
from sparse_hf.algorithms.selection_checks import check_count, check_tensors
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
    masks (1 byte per weight) and the values near the threshold: about 1 % of 100 million, 6 % of a million, all of a
    few thousand, and more when many tie. A non-contiguous tensor is copied while it is read.

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
    layout = _checked_layout(scores, candidates, min_per_tensor, shards)
    choice = _choose(scores, num_keep, candidates, min_per_tensor, absolute, _names(names, layout), layout)
    return added_up(choice, layout.all_reduce_sum)


def keep_largest_each(
    scores: Sequence[Tensor],
    num_keep: Sequence[int],
    *,
    candidates: Sequence[Tensor] | None = None,
    min_per_tensor: int = 1,
    absolute: bool = False,
    names: Sequence[str] | None = None,
    shards: ShardLayout | None = None,
) -> list[Tensor]:
    """Keep exactly the `num_keep[i]` largest scores of tensor i, for every tensor.

    The same masks as `keep_largest` gives for one tensor after the other, by as many sums over ranks as the longest of
    these selections makes. Where ranks share tensors, values near the thresholds of all of them are held at once,
    otherwise (`ShardLayout.single_process`, or no `shards`) those of one.

    Args:
        scores, candidates, min_per_tensor, absolute, names, shards: as for `keep_largest`.
        num_keep: how many weights stay in each whole tensor.

    Returns:
        bool masks, True = kept, in the shapes and on the devices of `scores`.

    Raises:
        ValueError: as `keep_largest` for the first tensor that it would refuse; not one number per tensor.
    """
    scores = list(scores)
    layout = _checked_layout(scores, candidates, min_per_tensor, shards)
    names = _names(names, layout)
    if len(num_keep) != len(layout.numels):
        raise ValueError(
            f"`num_keep` must hold one number per tensor, got {len(num_keep)} for {len(layout.numels)}: match them."
        )
    here: list[list[int]] = [[] for _ in layout.numels]  # the numbers of this rank's pieces of each tensor
    for number, tensor in enumerate(layout.tensors):
        here[tensor].append(number)
    choices = [
        _choose(
            [scores[number] for number in numbers],
            num_keep[tensor],
            None if candidates is None else [candidates[number] for number in numbers],
            min_per_tensor,
            absolute,
            [names[tensor]],
            layout.part(tensor, numbers),
        )
        for tensor, numbers in enumerate(here)
    ]
    kept = each_added_up(choices, layout.all_reduce_sum)
    masks = {
        number: mask
        for numbers, some in zip(here, kept, strict=True)
        for number, mask in zip(numbers, some, strict=True)
    }
    return [masks[number] for number in range(len(scores))]


def _checked_layout(
    scores: Sequence[Tensor], candidates: Sequence[Tensor] | None, min_per_tensor: int, shards: ShardLayout | None
) -> ShardLayout:
    check_tensors(scores, candidates, min_per_tensor)
    layout = shards or ShardLayout.single_process(scores)
    layout.check(scores)
    return layout


def _choose(
    scores: Sequence[Tensor],
    num_keep: int,
    candidates: Sequence[Tensor] | None,
    min_per_tensor: int,
    absolute: bool,
    names: Sequence[str],
    layout: ShardLayout,
) -> Summing[list[Tensor]]:
    """What `keep_largest` does, between its checks and its sums."""
    dtype, num_candidates = yield from _agree(scores, candidates, layout, names)
    floors = [min(min_per_tensor, count) for count in num_candidates]
    check_count(num_keep, sum(num_candidates), sum(floors), min_per_tensor)
    pieces = _pieces(scores, candidates, layout, dtype, absolute)
    yield from _keep_with_floors(pieces, num_keep, num_candidates, floors, Model(layout.numels, names, dtype))
    return [piece.mask for piece in pieces]


def _keep_with_floors(
    pieces: Sequence[Piece], num_keep: int, num_candidates: Sequence[int], floors: Sequence[int], model: Model
) -> Summing[None]:
    """Select globally; where a tensor falls below its floor, fix its best `floor` and select again among the others.

    The threshold of the others can only rise, so a fixed tensor would not get more than its floor either way, and the
    result is the one described in `keep_largest`.
    """
    free = list(range(len(floors)))
    while True:
        chosen = [piece for piece in pieces if piece.tensor in free]
        yield from keep_top(chosen, num_keep, free, sum(num_candidates[tensor] for tensor in free), model)
        if not any(floors):
            return
        kept = [0] * len(floors)
        for piece in chosen:
            kept[piece.tensor] += count_kept(piece.mask)
        kept = yield from summed(*kept)
        starved = [tensor for tensor in free if kept[tensor] < floors[tensor]]
        if not starved:
            return
        of_each = [[piece for piece in pieces if piece.tensor == tensor] for tensor in starved]
        yield from together(
            [
                keep_top(own, floors[tensor], [tensor], num_candidates[tensor], model)
                for tensor, own in zip(starved, of_each, strict=True)
            ]
        )
        num_keep -= sum(floors[tensor] for tensor in starved)
        free = [tensor for tensor in free if tensor not in starved]


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
) -> Summing[tuple[np.dtype, list[int]]]:
    """The dtype in which all ranks compare, and the number of candidates of every whole tensor."""
    tensors = len(layout.numels)
    held, allowed = [0] * tensors, [0] * tensors
    for i, (score, tensor) in enumerate(zip(scores, layout.tensors, strict=True)):
        held[tensor] += score.numel()
        allowed[tensor] += score.numel() if candidates is None else count_kept(candidates[i])
    double = any(score.dtype == torch.float64 for score in scores)
    double, *counts = yield from summed(int(double), *held, *allowed)
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
