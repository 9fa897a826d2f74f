"""Where the pieces that this rank holds lie in the whole tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_hf.algorithms.joint_sums import alone


@dataclass(frozen=True)
class ShardLayout:
    """What `keep_largest` must know to give every rank its part of the mask one process would have chosen.

    A piece is a run of consecutive weights of one whole tensor, in flat (row-major) order: the shard of FSDP2 or a
    range of a ZeRO partition. A rank may hold any number of pieces of a tensor, or none. A tensor that is split along
    another dimension than the first (row-parallel tensor parallelism) is given as one piece per row.

    Args:
        numels: number of weights of every WHOLE tensor, in the same order on all ranks; this order breaks ties.
        tensors: for each piece of this rank, the position in `numels` of the tensor it belongs to.
        starts: for each piece of this rank, the flat index of its first weight in that whole tensor.
        all_reduce_sum: takes an int64 CPU tensor and returns its sum over the ranks that TOGETHER hold each weight
            exactly once. Where weights are replicated (HSDP), these are the ranks of one replica. Must return the same
            result on all of them. Called about 20 times with at most 4 KiB, or 4 KiB per tensor by
            `keep_largest_each`. `joint_sums.alone` where this process holds everything.
    """

    numels: tuple[int, ...]
    tensors: tuple[int, ...]
    starts: tuple[int, ...]
    all_reduce_sum: Callable[[Tensor], Tensor]

    @classmethod
    def single_process(cls, tensors: Sequence[Tensor]) -> "ShardLayout":
        """The layout in which this process holds every tensor whole."""
        return cls(
            numels=tuple(tensor.numel() for tensor in tensors),
            tensors=tuple(range(len(tensors))),
            starts=(0,) * len(tensors),
            all_reduce_sum=alone,
        )

    def part(self, tensor: int, pieces: Sequence[int]) -> "ShardLayout":
        """The layout of one whole tensor alone, of which this rank holds the pieces with these numbers."""
        starts = tuple(self.starts[number] for number in pieces)
        return ShardLayout((self.numels[tensor],), (0,) * len(starts), starts, self.all_reduce_sum)

    def check(self, pieces: Sequence[Tensor]) -> None:
        """Raise ValueError unless `pieces` fit into the whole tensors."""
        if not len(pieces) == len(self.tensors) == len(self.starts):
            raise ValueError(
                f"`shards` must describe every score tensor, got {len(self.tensors)} `tensors` and "
                f"{len(self.starts)} `starts` for {len(pieces)} scores: add one entry per piece."
            )
        for piece, tensor, start in zip(pieces, self.tensors, self.starts, strict=True):
            if not 0 <= tensor < len(self.numels):
                raise ValueError(
                    f"`shards.tensors` must be in 0..{len(self.numels) - 1}, got {tensor}: index `numels`."
                )
            if not 0 <= start <= start + piece.numel() <= self.numels[tensor]:
                raise ValueError(
                    f"A piece must lie inside its tensor of {self.numels[tensor]} weights, got {piece.numel()} "
                    f"weights from {start}: pass flat starts in the whole tensor, without padding."
                )
