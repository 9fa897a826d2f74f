"""Ranks of a selection, as threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

from sparse_hf.algorithms.shard_layout import ShardLayout


class Ranks:
    """An all-reduce between threads. A rank that does not come breaks the barrier and fails the test."""

    def __init__(self, size):
        self.size = size
        self.slots = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)
        self.sizes = []  # counts in each sum

    def all_reduce_sum(self, rank):
        def reduce(counts):
            assert counts.dtype == torch.int64
            if rank == 0:
                self.sizes.append(counts.numel())
            self.slots[rank] = counts
            self.barrier.wait()
            total = sum(self.slots)
            self.barrier.wait()
            return total

        return reduce

    def run(self, function):
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(function, rank) for rank in range(self.size)]
            return [future.result() for future in futures]


def deal(tensors, cuts):
    """Cut each whole tensor at its `cuts`; run i of it goes to rank i. (tensor, start, flat piece) per rank."""
    ranks = [[] for _ in range(len(cuts[0]) + 1)]
    for index, tensor in enumerate(tensors):
        bounds = [0, *cuts[index], tensor.numel()]
        for rank, (start, stop) in enumerate(pairwise(bounds)):
            ranks[rank].append((index, start, tensor.flatten()[start:stop]))
    return ranks


def on_each_rank(select, ranks, tensors, cuts, num_keep, candidates=None, **options):
    """What `select` (`keep_largest` or `keep_largest_each`) returns on every rank, of tensors cut into runs."""
    parts = deal(tensors, cuts)
    allowed = None if candidates is None else deal(candidates, cuts)

    def one_rank(rank):
        layout = ShardLayout(
            numels=tuple(tensor.numel() for tensor in tensors),
            tensors=tuple(index for index, _, _ in parts[rank]),
            starts=tuple(start for _, start, _ in parts[rank]),
            all_reduce_sum=ranks.all_reduce_sum(rank),
        )
        pieces = [piece for _, _, piece in parts[rank]]
        own = None if allowed is None else [piece for _, _, piece in allowed[rank]]
        return select(pieces, num_keep, candidates=own, shards=layout, **options)

    return ranks.run(one_rank)


def joined(per_rank, tensors):
    """Whole masks: piece i of every rank is its run of tensor i."""
    return [
        torch.cat(pieces).view(tensor.shape)
        for pieces, tensor in zip(zip(*per_rank, strict=True), tensors, strict=True)
    ]
