"""The same masks whatever way the selection takes: bracket, mass of ties, missed bracket, blocks, devices."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.naive_selection import assert_same_masks, naive_keep_largest
from sparse_hf.algorithms import block_scan, global_selection
from sparse_hf.algorithms.selection import keep_largest


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    numels = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = [torch.randint(-levels, levels + 1, (numel,), generator=generator) / 7 for numel in numels]
    candidates = None
    if draw(st.booleans()):
        candidates = [torch.rand(numel, generator=generator) < 0.6 for numel in numels]
    allowed = numels if candidates is None else [int(candidate.sum()) for candidate in candidates]
    min_per_tensor = draw(st.integers(0, 3))
    least = sum(min(min_per_tensor, count) for count in allowed)
    return {
        "scores": scores,
        "num_keep": draw(st.integers(least, sum(allowed))),
        "candidates": candidates,
        "min_per_tensor": min_per_tensor,
        "absolute": draw(st.booleans()),
    }


@pytest.mark.parametrize("sample_size", [5, 20, 1000])  # brackets that often miss, that seldom do, no bracket
@pytest.mark.parametrize("uses_numpy", [True, False])  # False: as on an accelerator
@given(problem=problems())
def test_equals_a_stable_sort(sample_size, uses_numpy, problem):
    with (
        mock.patch.object(global_selection, "SAMPLE_SIZE", sample_size),
        mock.patch.object(global_selection, "UNSAMPLED", 2 * sample_size),
        mock.patch.object(global_selection, "SIGMAS", 0),
        mock.patch.object(block_scan, "_uses_numpy", return_value=uses_numpy),
        mock.patch.object(block_scan, "CPU_BLOCK", 16),
        mock.patch.object(block_scan, "DEVICE_BLOCK", 16),
    ):
        masks = keep_largest(**problem)
    assert_same_masks(masks, naive_keep_largest(**problem))


SHAPES = [(300, 700), (700, 300), (1000, 300)]  # 720 000 weights: large enough for a sampled bracket


def large_weights(kind):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * (1 + i) for i, shape in enumerate(SHAPES)]
    if kind == "64 levels":
        return [(weight * 10).round().clamp(-32, 31) / 10 for weight in weights]
    if kind == "half zeros":
        return [weight * (torch.rand(weight.shape, generator=generator) < 0.5) for weight in weights]
    if kind == "sorted":
        return [weight.flatten().sort().values.view(weight.shape) for weight in weights]
    return [weight.to(getattr(torch, kind)) for weight in weights]


def stable_sort_mask(weights, num_keep):
    flat = torch.cat([weight.flatten().float().abs() for weight in weights])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:num_keep]] = True
    return [part.view(w.shape) for part, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)]


@pytest.mark.parametrize("density", [0.01, 0.4, 0.75])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "64 levels", "half zeros", "sorted"])
def test_large_weights(kind, density):
    weights = large_weights(kind)
    num_keep = round(density * sum(weight.numel() for weight in weights))
    masks = keep_largest(weights, num_keep, absolute=True, min_per_tensor=0)
    assert_same_masks(masks, stable_sort_mask(weights, num_keep))


def test_the_usual_case_reads_the_weights_once():
    weights = large_weights("float32")
    with mock.patch.object(global_selection, "scan", wraps=block_scan.scan) as scan:
        keep_largest(weights, 300_000, absolute=True)
    assert scan.call_count == len(weights)
    low, high = scan.call_args.args[1:]
    inside = sum(int(((weight.abs() > low) & (weight.abs() <= high)).sum()) for weight in weights)
    # Of 720,000 about 15,000 are drawn; 10 sigma of so many are at most twice as many weights, and the sample varies.
    assert 0 < inside < 3 * global_selection.sample_size(720_000) < 0.07 * 720_000


def test_a_sample_and_its_bracket_are_few_together():
    for total in (20_000, 10**6, 45_000_000, 7 * 10**9):
        size = global_selection.sample_size(total)
        held = [other + 5 * total / other**0.5 for other in (size, size // 2, 2 * size)]
        assert size <= 2**18
        assert held[0] <= held[1]
        assert held[0] <= held[2] or size == 2**18


def patched_bracket(low, high):
    """Two values that no sample found, from a computation that makes no sums."""

    def bracket(*_):
        yield from ()
        return low, high

    return mock.patch.object(global_selection, "_bracket", bracket)


@pytest.mark.parametrize("bracket", [(0.1, 0.2), (5.0, 6.0), (0.3, 0.3), (-1.0, 1e9)])
def test_a_wrong_bracket_costs_time_only(bracket):
    weights = large_weights("float32")
    with patched_bracket(*bracket):
        masks = keep_largest(weights, 200_000, absolute=True)
    assert_same_masks(masks, stable_sort_mask(weights, 200_000))


def test_only_candidates_count_in_a_mass_of_ties():
    # 100 ones that may stay, then zeros of which every third may: 50 of these are needed.
    scores = [torch.cat([torch.ones(100), torch.zeros(500)])]
    candidates = [torch.arange(600) % 3 == 0]
    candidates[0][:100] = True
    with patched_bracket(0.0, 0.5):
        [mask] = keep_largest(scores, 150, candidates=candidates)
    assert mask.nonzero().flatten().tolist() == [*range(100), *range(102, 252, 3)]


def test_nested_rounds_only_lose_weights():
    weights = large_weights("64 levels")
    masks = None
    for num_keep in (600_000, 400_000, 100_000):
        later = keep_largest(weights, num_keep, candidates=masks, absolute=True)
        assert sum(int(mask.sum()) for mask in later) == num_keep
        if masks is not None:
            assert not any((new & ~old).any() for new, old in zip(later, masks, strict=True))
        # The order does not change, so a nested selection is the plain one.
        assert_same_masks(later, keep_largest(weights, num_keep, absolute=True))
        masks = later
