import math

import pytest
import torch
from torch.nn.utils import prune

from algorithms.naive_selection import assert_same_masks, naive_keep_largest
from sparse_hf.algorithms.selection import keep_largest


def bits(masks):
    return ["".join(str(int(bit)) for bit in mask.flatten()) for mask in masks]


def test_the_largest_of_all_tensors_are_kept():
    scores = [torch.tensor([[5.0, 1.0], [2.0, 7.0]]), torch.tensor([6.0, 3.0, 4.0])]
    masks = keep_largest(scores, 4)
    assert bits(masks) == ["1001", "101"]
    assert masks[0].shape == (2, 2)
    assert masks[0].dtype == torch.bool


def test_ties_keep_earlier_tensors_then_lower_indices():
    scores = [torch.tensor([1.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 1.0])]
    assert bits(keep_largest(scores, 2)) == ["010", "100"]
    assert bits(keep_largest(scores, 3)) == ["110", "100"]
    assert bits(keep_largest(scores, 4)) == ["111", "100"]
    assert bits(keep_largest(scores, 5)) == ["111", "110"]


@pytest.mark.parametrize("num_keep", range(7))
def test_equal_scores_keep_exactly_the_count(num_keep):
    # quantile thresholds keep all or nothing here
    masks = keep_largest([torch.zeros(4), torch.zeros(2)], num_keep, min_per_tensor=0)
    assert "".join(bits(masks)) == "1" * num_keep + "0" * (6 - num_keep)


def test_signed_scores_rank_negative_below_positive_and_both_zeros_alike():
    scores = [torch.tensor([-5.0, 0.5, -0.0, 0.0, -0.1])]
    assert bits(keep_largest(scores, 1)) == ["01000"]
    assert bits(keep_largest(scores, 2)) == ["01100"]
    assert bits(keep_largest(scores, 3)) == ["01110"]
    assert bits(keep_largest(scores, 4)) == ["01111"]


def test_absolute_ranks_by_magnitude_and_leaves_the_weights_alone():
    weight = torch.nn.Parameter(torch.tensor([-5.0, 0.5, -0.1, 4.0]))
    before = weight.detach().clone()
    assert bits(keep_largest([weight], 2, absolute=True)) == ["1001"]
    assert torch.equal(weight, before)


def test_only_candidates_are_kept():
    scores = [torch.tensor([9.0, 1.0, 8.0]), torch.tensor([7.0, 2.0])]
    candidates = [torch.tensor([False, True, True]), torch.tensor([False, True])]
    assert bits(keep_largest(scores, 2, candidates=candidates)) == ["001", "01"]
    assert bits(keep_largest(scores, 3, candidates=candidates)) == ["011", "01"]


def test_candidates_far_below_all_others():
    scores = [torch.tensor([0.0, -1e30, -3e38])]
    assert bits(keep_largest(scores, 1, candidates=[torch.tensor([False, True, True])])) == ["010"]


def test_no_tensor_is_emptied():
    scores = [torch.tensor([9.0, 8.0, 7.0]), torch.tensor([0.1, 0.2]), torch.tensor([[0.3, 0.3]])]
    assert bits(keep_largest(scores, 3)) == ["100", "01", "10"]
    assert bits(keep_largest(scores, 4)) == ["110", "01", "10"]
    assert bits(keep_largest(scores, 3, min_per_tensor=0)) == ["111", "00", "00"]


def test_a_tensor_with_fewer_candidates_keeps_them_all():
    scores = [torch.tensor([9.0, 8.0, 7.0]), torch.tensor([1.0, 2.0]), torch.empty(0, 4), torch.tensor([1.0])]
    candidates = [torch.ones(3, dtype=torch.bool), torch.tensor([True, False])]
    candidates += [torch.ones(0, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    masks = keep_largest(scores, 3, candidates=candidates, min_per_tensor=2)
    assert bits(masks) == ["110", "10", "", "0"]
    assert masks[2].shape == (0, 4)


def test_fixing_one_tensor_may_starve_the_next():
    # Plain: 10 and 9. Giving tensor 2 its one takes 9 from tensor 1, which must then get it back from tensor 0's 8.
    scores = [torch.tensor([10.0, 9.5, 8.0]), torch.tensor([9.0, 0.0]), torch.tensor([0.1])]
    assert bits(keep_largest(scores, 3, min_per_tensor=0)) == ["110", "10", "0"]
    assert bits(keep_largest(scores, 3)) == ["100", "10", "1"]
    assert_same_masks(keep_largest(scores, 3), naive_keep_largest(scores, 3, min_per_tensor=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("absolute", [False, True])
def test_every_floating_dtype(dtype, absolute):
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(30, 20, generator=generator).to(dtype), torch.randn(500, generator=generator).to(dtype)]
    masks = keep_largest(scores, 400, absolute=absolute)
    assert_same_masks(masks, naive_keep_largest(scores, 400, min_per_tensor=1, absolute=absolute))


def test_fp64_differences_below_fp32_resolution_count_also_among_fp32_tensors():
    scores = [torch.tensor([1.0]), torch.tensor([1.0, 1.0 + 2.0**-40], dtype=torch.float64)]
    assert bits(keep_largest(scores, 1, min_per_tensor=0)) == ["0", "01"]


def test_non_contiguous_scores_and_candidates():
    generator = torch.Generator().manual_seed(2)
    score = torch.randn(40, 30, generator=generator).t()
    allowed = (torch.rand(40, 30, generator=generator) < 0.7).t()
    strided = torch.randn(100, generator=generator)[::3]
    candidates = [allowed, torch.ones(34, dtype=torch.bool)]
    masks = keep_largest([score, strided], 300, candidates=candidates)
    assert_same_masks(masks, naive_keep_largest([score, strided], 300, candidates, min_per_tensor=1))


def test_the_same_weights_stay_as_with_global_unstructured():
    generator = torch.Generator().manual_seed(3)
    layers = [torch.nn.Linear(32, 24), torch.nn.Linear(24, 40)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, generator=generator)
    weights = [layer.weight.detach().clone() for layer in layers]
    total = sum(weight.numel() for weight in weights)
    pairs = [(layer, "weight") for layer in layers]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=1000)
    masks = keep_largest(weights, total - 1000, absolute=True)
    assert_same_masks(masks, [layer.weight_mask.bool() for layer in layers])


def test_no_tensors_keep_nothing():
    assert keep_largest([], 0) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.filterwarnings("error")
def test_scores_that_are_not_finite_are_refused_by_name(bad, absolute):
    scores = [torch.ones(3), torch.tensor([1.0, bad, 2.0])]
    with pytest.raises(ValueError, match="got NaN or infinity in tensor 1: training may have diverged"):
        keep_largest(scores, 2, absolute=absolute)
    with pytest.raises(ValueError, match="got NaN or infinity in `head.weight`:"):
        keep_largest(scores, 2, absolute=absolute, names=["body.weight", "head.weight"])


@pytest.mark.parametrize(
    ("num_keep", "options", "message"),
    [
        (6, {}, r"`num_keep` must be in 0..5, the number of candidates, got 6"),
        (-1, {}, r"`num_keep` must be in 0..5"),
        (
            4,
            {"candidates": [torch.ones(3) > 0, torch.zeros(2) > 0]},
            r"must be in 0..3, .* got 4: masks that are nested",
        ),
        (1, {}, "must be at least 2 to keep `min_per_tensor=1` in every tensor, got 1: lower the sparsity"),
        (2, {"min_per_tensor": -1}, "`min_per_tensor` must be at least 0, got -1"),
        (2, {"candidates": [torch.ones(3) > 0]}, "`candidates` must match `scores`, got 1 for 2"),
        (2, {"candidates": [torch.ones(3), torch.ones(2)]}, "must be bool of shape .* got torch.float32"),
        (2, {"candidates": [torch.ones(4) > 0, torch.ones(2) > 0]}, r"of shape \(4,\) on cpu at position 0"),
        (2, {"names": ["a"]}, "`names` must name every tensor, got 1 for 2"),
    ],
)
def test_refusals(num_keep, options, message):
    with pytest.raises(ValueError, match=message):
        keep_largest([torch.ones(3), torch.ones(2)], num_keep, **options)


def test_integer_scores_are_refused():
    with pytest.raises(ValueError, match="`scores` must be floating, got torch.int64 at position 0"):
        keep_largest([torch.arange(3)], 1)
