"""Every rank gets its part of the mask that one process would have chosen; ranks are threads here."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.naive_selection import assert_same_masks
from algorithms.thread_ranks import Ranks, deal, joined, on_each_rank
from sparse_hf.algorithms import global_selection
from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.algorithms.shard_layout import ShardLayout


def sharded_keep_largest(tensors, cuts, num_keep, **options):
    ranks = Ranks(len(cuts[0]) + 1)
    return joined(on_each_rank(keep_largest, ranks, tensors, cuts, num_keep, **options), tensors)


@st.composite
def sharded_problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    numels = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    tensors = [torch.randint(-levels, levels + 1, (numel,), generator=generator) / 3 for numel in numels]
    size = draw(st.integers(2, 3))
    cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=size - 1, max_size=size - 1))) for n in numels]
    candidates = [torch.rand(n, generator=generator) < 0.7 for n in numels] if draw(st.booleans()) else None
    allowed = numels if candidates is None else [int(candidate.sum()) for candidate in candidates]
    least = draw(st.integers(0, 2))
    num_keep = draw(st.integers(sum(min(least, count) for count in allowed), sum(allowed)))
    options = {"candidates": candidates, "min_per_tensor": least, "absolute": draw(st.booleans())}
    return tensors, cuts, num_keep, options


@pytest.mark.parametrize("sample_size", [5, 15, 1000])
@given(problem=sharded_problems())
def test_equals_one_process(sample_size, problem):
    tensors, cuts, num_keep, options = problem
    with (
        mock.patch.object(global_selection, "SAMPLE_SIZE", sample_size),
        mock.patch.object(global_selection, "UNSAMPLED", 2 * sample_size),
        mock.patch.object(global_selection, "SIGMAS", 0),
    ):
        masks = sharded_keep_largest(tensors, cuts, num_keep, **options)
    assert_same_masks(masks, keep_largest(tensors, num_keep, **options))


@pytest.mark.parametrize("levels", [None, 64])
@pytest.mark.parametrize("cuts", [[(1, 200_001), (0, 150_000)], [(100_000, 100_000), (299_999, 300_000)]])
def test_large_uneven_shards(levels, cuts):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(500, 600, generator=generator), torch.randn(300_000, generator=generator)]
    if levels:
        tensors = [(tensor * 10).round().clamp(-levels // 2, levels // 2 - 1) for tensor in tensors]
    masks = sharded_keep_largest(tensors, cuts, 123_456, absolute=True)
    assert_same_masks(masks, keep_largest(tensors, 123_456, absolute=True))


def test_a_tie_across_shards_goes_to_the_lower_position():
    # Five equal scores in three shards of one tensor and two of another; the first three positions win.
    tensors, cuts = [torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0])], [(1, 3), (0, 1)]
    masks = sharded_keep_largest(tensors, cuts, 3, min_per_tensor=0)
    assert [mask.int().tolist() for mask in masks] == [[1, 0, 1, 1], [0, 0]]
    masks = sharded_keep_largest(tensors, cuts, 3)
    assert [mask.int().tolist() for mask in masks] == [[1, 0, 1, 0], [1, 0]]


def test_pieces_in_any_order_and_column_shards_as_rows():
    weight = torch.tensor([[4.0, 1.0, 2.0, 3.0], [4.0, 3.0, 9.0, 0.0]])
    ranks = Ranks(2)

    def one_rank(rank):
        columns = weight[:, 2 * rank : 2 * rank + 2]
        layout = ShardLayout((8,), (0, 0), (4 + 2 * rank, 2 * rank), ranks.all_reduce_sum(rank))
        second, first = keep_largest([columns[1], columns[0]], 4, shards=layout)
        return torch.stack([first, second])

    mask = torch.cat(ranks.run(one_rank), dim=1)
    assert mask.int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]


def test_ranks_without_any_piece_and_with_other_dtypes_take_part():
    ranks = Ranks(3)

    def one_rank(rank):
        pieces = [[torch.tensor([1.0, 1.0 + 2.0**-40], dtype=torch.float64)], [], [torch.tensor([3.0, 0.0])]][rank]
        start = (0,) if rank == 0 else (2,)
        layout = ShardLayout((4,), (0,) * len(pieces), start * len(pieces), ranks.all_reduce_sum(rank))
        return [mask.int().tolist() for mask in keep_largest(pieces, 2, shards=layout)]

    assert ranks.run(one_rank) == [[[0, 1]], [], [[1, 0]]]


def test_a_nan_on_one_rank_raises_on_all():
    tensors, cuts = [torch.ones(4), torch.tensor([1.0, 2.0, float("nan")])], [(2,), (1,)]
    parts, ranks = deal(tensors, cuts), Ranks(2)

    def one_rank(rank):
        layout = ShardLayout((4, 3), (0, 1), tuple(start for _, start, _ in parts[rank]), ranks.all_reduce_sum(rank))
        with pytest.raises(ValueError, match="got NaN or infinity in `b`:"):
            keep_largest([piece for _, _, piece in parts[rank]], 3, names=["a", "b"], shards=layout)
        return True

    assert ranks.run(one_rank) == [True, True]


def test_replicated_weights_are_refused_on_all_ranks():
    ranks = Ranks(2)

    def one_rank(rank):
        layout = ShardLayout((3,), (0,), (0,), ranks.all_reduce_sum(rank))
        with pytest.raises(ValueError, match="each weight exactly once, got 6 weights of 3 for tensor 0: reduce over"):
            keep_largest([torch.ones(3)], 2, shards=layout)
        return True

    assert ranks.run(one_rank) == [True, True]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (((3,), (0, 0), (0,)), "got 2 `tensors` and 1 `starts` for 1 scores"),
        (((3,), (1,), (0,)), r"`shards.tensors` must be in 0..0, got 1"),
        (((3,), (0,), (2,)), "must lie inside its tensor of 3 weights, got 3 weights from 2"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        keep_largest([torch.ones(3)], 1, shards=ShardLayout(*layout, all_reduce_sum=lambda counts: counts))
