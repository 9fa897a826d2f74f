"""Selections in many tensors at once choose as one by one, in as many sums as the longest."""

import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.naive_selection import assert_same_masks
from algorithms.thread_ranks import Ranks, joined, on_each_rank
from sparse_hf.algorithms import global_selection
from sparse_hf.algorithms.selection import keep_largest, keep_largest_each
from sparse_hf.algorithms.shard_layout import ShardLayout


def one_by_one(tensors, counts, candidates=None, names=None, **options):
    masks = []
    for position, (tensor, count) in enumerate(zip(tensors, counts, strict=True)):
        own = None if candidates is None else [candidates[position]]
        masks += keep_largest([tensor], count, candidates=own, names=names and [names[position]], **options)
    return masks


def sharded(tensors, cuts, counts, **options):
    ranks = Ranks(len(cuts[0]) + 1)
    return joined(on_each_rank(keep_largest_each, ranks, tensors, cuts, counts, **options), tensors), ranks.sizes


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    numels = draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    tensors = [torch.randint(-levels, levels + 1, (numel,), generator=generator) / 3 for numel in numels]
    if draw(st.booleans()):
        tensors[0] = tensors[0].double()
    size = draw(st.integers(2, 3))
    cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=size - 1, max_size=size - 1))) for n in numels]
    candidates = [torch.rand(n, generator=generator) < 0.7 for n in numels] if draw(st.booleans()) else None
    allowed = numels if candidates is None else [int(candidate.sum()) for candidate in candidates]
    least = draw(st.integers(0, 2))
    counts = [draw(st.integers(min(least, count), count)) for count in allowed]
    return tensors, cuts, counts, {"candidates": candidates, "min_per_tensor": least, "absolute": draw(st.booleans())}


@pytest.mark.parametrize("sample_size", [5, 15, 1000])
@given(problem=problems())
def test_equals_one_by_one(sample_size, problem):
    tensors, cuts, counts, options = problem
    expected = one_by_one(tensors, counts, **options)
    with (
        mock.patch.object(global_selection, "SAMPLE_SIZE", sample_size),
        mock.patch.object(global_selection, "UNSAMPLED", 2 * sample_size),
        mock.patch.object(global_selection, "SIGMAS", 0),
    ):
        assert_same_masks(keep_largest_each(tensors, counts, **options), expected)
        assert_same_masks(sharded(tensors, cuts, counts, **options)[0], expected)


def test_many_tensors_cost_as_many_sums_as_one():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(200, 150, generator=generator) * (1 + i) for i in range(12)]
    masks, sizes = sharded(tensors, [(10_000,)] * 12, [12_345] * 12, absolute=True)
    assert_same_masks(masks, one_by_one(tensors, [12_345] * 12, absolute=True))
    _, of_one = sharded(tensors[:1], [(10_000,)], [12_345], absolute=True)
    assert len(sizes) == len(of_one) <= 16
    assert sum(sizes) == 12 * sum(of_one)


def test_ranks_that_hold_nothing_of_a_tensor_and_pieces_in_any_order():
    """The first rank has the ends of b, in the wrong order; the second all of a and the middle of b."""
    a, b, ranks = torch.tensor([1.0, 3.0, 3.0]), torch.tensor([5.0, 2.0, 4.0, 5.0, 5.0]), Ranks(2)

    def one_rank(rank):
        pieces, tensors, starts = [([b[3:], b[:1]], (1, 1), (3, 0)), ([b[1:3], a], (1, 0), (1, 0))][rank]
        layout = ShardLayout((3, 5), tensors, starts, ranks.all_reduce_sum(rank))
        return [mask.int().tolist() for mask in keep_largest_each(pieces, [1, 2], shards=layout)]

    assert ranks.run(one_rank) == [[[1, 0], [1]], [[0, 0], [0, 1, 0]]]


@pytest.mark.parametrize("wrong", ["finite", "count"])
def test_an_error_in_one_tensor_is_that_of_one_by_one_on_all_ranks(wrong):
    """NaNs are seen after counts are checked, and yet the first tensor's error is told."""
    tensors = [torch.arange(4.0), torch.tensor([1.0, 2.0, float("nan")]), torch.arange(4.0), torch.arange(3.0)]
    counts, options = [1, 2, 2, 2], {"names": ["a", "b", "c", "d"], "min_per_tensor": 0}
    counts[0 if wrong == "count" else 3] = 99
    with pytest.raises(ValueError, match="`num_keep` must be in|got NaN or infinity in `b`:") as alone:
        one_by_one(tensors, counts, **options)
    message = re.escape(str(alone.value))
    assert ("`b`" in message) == (wrong == "finite")
    with pytest.raises(ValueError, match=message):
        keep_largest_each(tensors, counts, **options)
    ranks = Ranks(2)

    def one_rank(rank):
        own = [tensor[:2] if rank == 0 else tensor[2:] for tensor in tensors]
        layout = ShardLayout((4, 3, 4, 3), (0, 1, 2, 3), (2 * rank,) * 4, ranks.all_reduce_sum(rank))
        with pytest.raises(ValueError, match=message):
            keep_largest_each(own, counts, shards=layout, **options)
        return True

    assert ranks.run(one_rank) == [True, True]


def test_default_names_are_positions_among_all_tensors():
    with pytest.raises(ValueError, match="in tensor 1: training may"):
        keep_largest_each([torch.ones(2), torch.full((2,), torch.inf)], [1, 1])


def test_bad_input():
    with pytest.raises(ValueError, match="one number per tensor, got 1 for 2: match them"):
        keep_largest_each([torch.ones(2), torch.ones(2)], [1])
    with pytest.raises(ValueError, match="`scores` must be floating, got torch.int64 at position 1"):
        keep_largest_each([torch.ones(2), torch.arange(2)], [1, 1])
    with pytest.raises(ValueError, match="got 1 for 2: pass one per tensor"):
        keep_largest_each([torch.ones(2)] * 2, [1, 1], candidates=[torch.ones(2, dtype=torch.bool)])
    assert keep_largest_each([], []) == []
