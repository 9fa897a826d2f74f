"""How tokens and experts find each other, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.moe.generic_routers import changes_function
from sparse_hf.moe.mixture_routers import (
    CosineRouter,
    HashRouter,
    RouterConfig,
    experts_by_logits,
    hash_table,
    tokens_by_experts,
    within_capacity,
)


def all_of(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_a_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    plain, weights = experts_by_logits(logits, None, 2, True)
    assert plain.tolist() == [[0, 1]]
    assert torch.equal(weights, torch.tensor([[3.0, 2.0]]).softmax(-1))
    biased, weights = experts_by_logits(logits, torch.tensor([0.0, 0.0, 0.0, 2.5]), 2, True)
    assert biased.tolist() == [[0, 3]]
    assert torch.equal(weights, torch.tensor([[3.0, 0.0]]).softmax(-1))
    _, among_all = experts_by_logits(logits, torch.tensor([0.0, 0.0, 0.0, 2.5]), 2, False)
    assert torch.equal(among_all, logits.softmax(-1)[:, [0, 3]])


def test_zeros_as_a_bias_change_no_bit():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for normalised in (True, False):
        with_zeros = experts_by_logits(logits, torch.zeros(8), 3, normalised)
        assert all(map(torch.equal, with_zeros, experts_by_logits(logits, None, 3, normalised)))


def test_full_experts_lose_later_tokens():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    # ceil(1.0 x 4 tokens x 2 / 3 experts) = 3
    kept, dropped = within_capacity(experts, 3, 1.0, all_of(4))
    assert kept.tolist() == [[True, True], [True, True], [True, True], [True, False]]
    assert dropped.item() == pytest.approx(1 / 8)


def test_padding_takes_no_place():
    experts = torch.tensor([[0], [0], [0], [1]])
    counted = torch.tensor([False, True, True, True])
    kept, dropped = within_capacity(experts, 2, 1.0, counted)  # ceil(3 / 2) = 2
    assert kept.tolist() == [[False], [True], [True], [True]]
    assert dropped.item() == 0
    kept, dropped = within_capacity(experts, 2, 1.0, torch.zeros(4, dtype=torch.bool))
    assert not kept.any()
    assert torch.isfinite(dropped)


def test_the_dropped_fraction_of_a_skewed_load():
    """600, 200, ... of 1000 tokens against 1.25 x 1000 / 8 = 156.25 rounded up: 443 + 43 are lost."""
    loads = [600, 200, 100, 40, 30, 10, 10, 10]
    experts = torch.cat([torch.full((load, 1), expert) for expert, load in enumerate(loads)])
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    kept, dropped = within_capacity(experts[order], 8, 1.25, all_of(1000))
    assert dropped.item() == pytest.approx(0.486)
    assert torch.bincount(experts[order][kept], minlength=8).tolist() == [157, 157, 100, 40, 30, 10, 10, 10]


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "places"), [(1.1, 10, 11, 1), (1.25, 8, 10, 1), (0.3, 10, 1, 3)]
)
def test_capacity_is_exact_for_the_decimal_that_is_written(factor, tokens, experts, places):
    kept, _ = within_capacity(torch.zeros(tokens, 1, dtype=torch.long), experts, factor, all_of(tokens))
    assert kept.sum() == places


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_kept_depends_on_no_later_token(data):
    experts, top_k, tokens = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 2)), data.draw(st.integers(2, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    other = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    at, factor = data.draw(st.integers(1, tokens)), data.draw(st.sampled_from([0.5, 1.0, 1.25]))
    changed = torch.cat([chosen[:at], other[at:]])
    first, second = (within_capacity(one, experts, factor, all_of(tokens))[0] for one in (chosen, changed))
    assert torch.equal(first[:at], second[:at])
    assert torch.bincount(chosen[first], minlength=experts).max() <= -(-factor * tokens * top_k // experts)


def test_experts_take_the_tokens_that_want_them_most_and_the_first_of_equals():
    scores = torch.tensor([[[0.1, 0.5], [0.9, 0.5], [0.3, 0.5], [0.8, 0.6]]])
    positions, taken = tokens_by_experts(scores, 1.0, all_of(1, 4))
    assert positions.tolist() == [[[1, 3], [3, 0]]]
    assert taken.all()


def test_experts_take_no_padding_and_share_what_is_there():
    scores = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True] * 6, [False, True, True, False, False, False]])
    positions, taken = tokens_by_experts(scores, 1.5, counted)  # 3 of 6, and 1 of 2
    assert taken.sum(-1).tolist() == [[3, 3, 3], [1, 1, 1]]
    assert counted[1][positions[1][taken[1]]].all()
    alone, its = tokens_by_experts(scores[1:, 1:3], 1.5, all_of(1, 2))
    assert torch.equal(positions[1][taken[1]], alone[0][its[0]] + 1)
    everything, taken = tokens_by_experts(scores, 3.0, counted)
    assert taken.sum(-1).tolist() == [[6, 6, 6], [2, 2, 2]]
    assert everything.shape == (2, 3, 6)


@pytest.mark.parametrize(("vocabulary", "experts"), [(100, 4), (101, 8), (7, 7)])
def test_hashes_are_balanced_and_fixed_by_seed_and_layer(vocabulary, experts):
    table = hash_table(vocabulary, experts, layer=1)
    counts = torch.bincount(table.long(), minlength=experts)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(table, hash_table(vocabulary, experts, layer=1))
    assert not torch.equal(table, hash_table(vocabulary, experts, layer=2))
    assert not torch.equal(table, hash_table(vocabulary, experts, layer=1, seed=1))


def test_ids_added_to_a_vocabulary_are_hashed_too():
    router = HashRouter(4, 10, layer=0)
    assert torch.equal(router(torch.tensor([[10, 23]])), router(torch.tensor([[0, 3]])))


def test_cosine_logits_do_not_grow_with_vectors():
    router = CosineRouter(4, 16, 3)
    for one in (router.projection, router.weight):
        torch.nn.init.normal_(one, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    logits = router(tokens)
    assert logits.shape == (5, 4)
    assert logits.abs().max() <= 1 / 0.3 + 1e-5
    low = tokens @ router.projection.T
    assert torch.allclose(logits, torch.cosine_similarity(low[:, None], router.weight[None], dim=-1) / 0.3, atol=1e-5)
    assert torch.allclose(router(tokens * 100), logits, atol=1e-5)
    with torch.no_grad():
        router.weight.mul_(50)
        assert torch.allclose(router(tokens), logits, atol=1e-5)
        router.log_temperature.fill_(-100)
    assert router(tokens).abs().max() <= 100 + 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("switch",), "one of top_k, expert_choice, hash, cosine, got 'switch'"),
        (("top_k", 1), "`bias` must be True or False, got 1"),
        (("top_k", False, 0), "`capacity_factor` must be above 0, got 0"),
        (("top_k", False, "1.25"), "`capacity_factor` must be above 0, got '1.25'"),
        (("top_k", False, float("nan")), "`capacity_factor` must be above 0, got nan"),
        (("cosine", False, None, 1), "`size` must be 2 or more, got 1"),
        (("top_k", False, None, 4), "'top_k' has no `size`"),
        (("expert_choice", True), "'expert_choice' has no `bias`"),
        (("hash", False, 1.25), "'hash' has no `capacity_factor`"),
        (("hash", False, None, None, False), "'hash' has no `norm_topk_prob`"),
    ],
)
def test_what_no_router_is(options, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(*options)


@pytest.mark.parametrize(
    ("router", "top_k", "exact"),
    [
        (RouterConfig(), 2, True),
        (RouterConfig("hash"), 1, True),
        (RouterConfig("cosine", norm_topk_prob=False), 2, False),
        (RouterConfig(norm_topk_prob=False), 4, True),
        (RouterConfig("expert_choice"), 2, False),
        (RouterConfig("expert_choice"), 4, True),
        (RouterConfig("expert_choice", capacity_factor=4.0, norm_topk_prob=False), 2, True),
        (RouterConfig("expert_choice", capacity_factor=3.9), 4, False),
    ],
)
def test_which_mixtures_of_4_copies_are_the_dense_model(router, top_k, exact):
    assert (changes_function(router, 4, top_k) is None) == exact


def test_only_what_is_not_the_default_is_told_in_a_config():
    assert RouterConfig().entries() == {}
    told = RouterConfig("cosine", bias=True, size=4).entries()
    assert told == {"router": "cosine", "router_bias": True, "router_size": 4}
