"""Load metrics by hand, and what chance alone does."""

import math

import pytest
import torch

from sparse_hf.algorithms.expert_load import expert_load, variation_by_chance


def test_by_hand():
    load = expert_load(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 9, 1, 0]]))
    assert load.max_violation.tolist() == pytest.approx([0, 3, 1])
    assert load.variation.tolist() == pytest.approx([0, math.sqrt(3), math.sqrt((25 + 16 + 16 + 25) / 4) / 5])
    entropy = -(0.5 * math.log(0.5) + 0.45 * math.log(0.45) + 0.05 * math.log(0.05)) / math.log(4)
    assert load.entropy.tolist() == pytest.approx([1, 0, entropy])
    assert load.min_share.tolist() == pytest.approx([1, 0, 0])
    assert load.dead.tolist() == [0, 3, 1]


def test_an_expert_is_dead_below_a_twentieth_of_a_fair_share():
    """Fair shares are 100 choices."""
    assert expert_load(torch.tensor([[195, 5]])).dead.item() == 0
    assert expert_load(torch.tensor([[196, 4]])).dead.item() == 1


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 1), (8, 7)])
def test_even_random_choice_varies_as_foreseen(experts, top_k):
    tokens = 500
    scores = torch.rand(100, tokens, experts, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(top_k, dim=-1).indices.reshape(100, -1)
    counts = torch.nn.functional.one_hot(chosen, experts).sum(1)
    measured = expert_load(counts).variation.square().mean().sqrt().item()
    assert measured == pytest.approx(variation_by_chance(experts, top_k, tokens), rel=0.1)


def test_every_expert_for_every_token_leaves_nothing_to_chance():
    assert variation_by_chance(4, 4, 10) == 0
    assert variation_by_chance(8, 2, 64_000) == pytest.approx(math.sqrt(6 / 128_000))
