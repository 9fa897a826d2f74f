"""One pass over the scores of a piece, in blocks that stay in the cache.

On the CPU the blocks are numpy arrays, whose float-to-bool comparison and `nonzero` are faster there than torch's; on
other devices they are torch tensors. The two libraries share the names used here. What the selection takes is timed by
`benchmarks/global_threshold.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


Block = np.ndarray | Tensor

CPU_BLOCK = 1 << 17  # 512 KiB of fp32, which stay in a core's cache
DEVICE_BLOCK = 1 << 24

_TORCH_OF = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


@dataclass
class Piece:
    """Scores that this rank holds, and the part of the mask that belongs to them.

    `scores`, `candidates` and `mask` have the same shape; `start` is the position of the first weight among all
    weights of all tensors. Values are read in `dtype` (fp32 or fp64), which holds every value exactly.
    """

    scores: Tensor
    candidates: Tensor | None
    mask: Tensor
    tensor: int
    start: int
    dtype: np.dtype
    absolute: bool

    def blocks(self) -> Iterator[tuple[int, Block, Block, Block | None]]:
        """(flat index of the first, values, view of the mask, candidates or None), in flat order.

        The next block overwrites the values.
        """
        scores, mask = self.scores.detach().reshape(-1), self.mask.view(-1)
        candidates = None if self.candidates is None else self.candidates.reshape(-1)
        on_cpu = _uses_numpy(mask)
        size = CPU_BLOCK if on_cpu else DEVICE_BLOCK
        buffer_size = min(size, scores.numel()) if self.absolute else 0
        buffer = torch.empty(buffer_size, dtype=_TORCH_OF[self.dtype], device=mask.device)
        buffer = buffer.numpy() if on_cpu else buffer
        for first in range(0, scores.numel(), size):
            part = slice(first, first + size)
            values = _numpy_values(scores[part], self.dtype) if on_cpu else scores[part].to(buffer.dtype)
            if self.absolute:
                values = _library(values).abs(values, out=buffer[: len(values)])
            allowed = None if candidates is None else candidates[part]
            if on_cpu:
                yield first, values, mask[part].numpy(), None if allowed is None else allowed.numpy()
            else:
                yield first, values, mask[part], allowed


@dataclass
class Bracketed:
    """What a scan found in one piece: `num_above` kept outright, and the values with low < value <= high."""

    num_above: int
    positions: np.ndarray
    values: np.ndarray
    finite: bool


def scan(piece: Piece, low: float, high: float) -> Bracketed:
    """Set the mask of the candidates above `high`, clear the others, and collect the candidates in (low, high]."""
    num_above, finite = 0, True
    positions, collected = [], []
    inside_buffer = None
    for first, values, mask, candidates in piece.blocks():
        library = _library(values)
        finite = finite and _is_finite(values, piece.absolute)
        above = library.greater(values, high, out=mask)
        inside_buffer = library.empty_like(above) if inside_buffer is None else inside_buffer
        inside = library.greater(values, low, out=inside_buffer[: len(values)])
        inside ^= above
        if candidates is not None:
            above &= candidates
            inside &= candidates
        num_above += int(library.count_nonzero(above))
        indices = _flat_nonzero(inside)
        collected.append(values[indices])
        indices += first
        positions.append(indices)
    return Bracketed(num_above, _gather(positions, np.dtype(np.int64)), _gather(collected, piece.dtype), finite)


def count_equal(piece: Piece, value: float) -> tuple[list[int], list[int]]:
    """For each block, its start among all weights and how many of its candidates equal `value`."""
    starts, counts = [], []
    for first, values, _, candidates in piece.blocks():
        starts.append(piece.start + first)
        counts.append(int(_library(values).count_nonzero(_equal(values, value, candidates))))
    return starts, counts


def keep_equal(piece: Piece, value: float, last_start: int, num_in_last: int) -> None:
    """Keep the candidates equal to `value` in the blocks before the one that starts at `last_start`.

    In that block, keep the first `num_in_last` of them.
    """
    for first, values, mask, candidates in piece.blocks():
        start = piece.start + first
        if start > last_start:
            return
        equal = _equal(values, value, candidates)
        if start < last_start:
            mask |= equal
        else:
            mask[_flat_nonzero(equal)[:num_in_last]] = True


def candidate_values(piece: Piece) -> Iterator[np.ndarray]:
    """The values of the candidates, block by block."""
    for _, values, _, candidates in piece.blocks():
        yield _gather([values if candidates is None else values[candidates]], piece.dtype)


def sample_values(piece: Piece, rate: float) -> np.ndarray:
    """The values of the candidates among about rate * numel random positions."""
    scores = piece.scores.detach().reshape(-1)
    if not scores.numel():
        return np.empty(0, dtype=piece.dtype)
    # What is drawn changes the speed only, never the mask.
    generator = torch.Generator().manual_seed(piece.start)
    positions = torch.randint(scores.numel(), (math.ceil(rate * scores.numel()),), generator=generator)
    positions = positions.to(scores.device)
    if piece.candidates is not None:
        positions = positions[piece.candidates.reshape(-1)[positions]]
    values = scores[positions].to("cpu", _TORCH_OF[piece.dtype]).numpy()
    return abs(values) if piece.absolute else values


def keep_positions(piece: Piece, positions: np.ndarray) -> None:
    """Set the mask at these flat indices."""
    mask = piece.mask.view(-1)
    if _uses_numpy(mask):
        mask.numpy()[positions] = True
    else:
        mask[torch.from_numpy(positions).to(mask.device)] = True


def count_kept(mask: Tensor) -> int:
    """Number of True in a mask."""
    return int(np.count_nonzero(mask.numpy()) if _uses_numpy(mask) else mask.count_nonzero())


def _is_finite(values: Block, absolute: bool) -> bool:
    """max and min carry a NaN through, and are far cheaper than isfinite on every value."""
    library = _library(values)
    return bool(library.isfinite(values.max())) and (absolute or bool(library.isfinite(values.min())))


def _gather(blocks: list[Block], dtype: np.dtype) -> np.ndarray:
    if not blocks:
        return np.empty(0, dtype=dtype)
    joined = _library(blocks[0]).concatenate(blocks)
    return joined if isinstance(joined, np.ndarray) else joined.cpu().numpy()


def _equal(values: Block, value: float, candidates: Block | None) -> Block:
    equal = values == value
    if candidates is not None:
        equal &= candidates
    return equal


def _uses_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _library(block: Block):
    return np if isinstance(block, np.ndarray) else torch


def _flat_nonzero(block: Block) -> Block:
    return np.flatnonzero(block) if isinstance(block, np.ndarray) else block.nonzero().view(-1)


def _numpy_values(values: Tensor, dtype: np.dtype) -> np.ndarray:
    """A 1-D CPU tensor as a numpy array of `dtype`, without a copy where the dtype is right already."""
    if values.dtype == torch.bfloat16:
        # numpy has no bf16; its bits are the upper half of those of the fp32 of the same value.
        array = (values.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    else:
        array = values.numpy()
    return array.astype(dtype, copy=False)
