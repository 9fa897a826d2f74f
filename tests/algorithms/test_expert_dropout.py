"""Which experts stay, and that a choice is made among them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.expert_dropout import AmongKept, kept_experts


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_by_hand(monkeypatch):
    """Draws below the probability are out; where fewer than top_k stay, the largest come back, the first of equals."""
    draws = torch.tensor([[0.9, 0.1, 0.6, 0.2], [0.1, 0.4, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    assert kept_experts(3, 4, 2, 0.5, seeded()).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
        [True, True, False, False],
    ]
    assert kept_experts(3, 4, 1, 0.5, seeded()).sum(1).tolist() == [2, 1, 1]


@given(st.integers(1, 8), st.floats(0, 0.99), st.integers(0, 50))
def test_enough_experts_stay_and_the_same_ones_again(top_k, probability, seed):
    kept = kept_experts(3, 8, top_k, probability, seeded(seed))
    assert kept.sum(1).min() >= top_k
    assert torch.equal(kept, kept_experts(3, 8, top_k, probability, seeded(seed)))
    if probability == 0:
        assert kept.all()


def test_the_probability_is_kept_to():
    assert kept_experts(1000, 64, 2, 0.3, seeded()).float().mean().item() == pytest.approx(0.7, abs=0.01)


SCORES = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
KEPT = torch.tensor([False, True, True, True])


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: torch.topk(scores, 2, dim=-1),
        lambda scores: torch.topk(scores, k=2, dim=-1),
        lambda scores: torch.topk(input=scores, k=2),
        lambda scores: scores.topk(2),
    ],
)
def test_however_the_choice_is_spelled(choose):
    with AmongKept(KEPT, 2) as choice:
        found = choose(SCORES)
    assert found.indices.tolist() == [[1, 2], [3, 2]]
    assert found.values.tolist() == SCORES.gather(1, found.indices).tolist()
    assert choice.choices == 1
    assert choose(SCORES).indices.tolist() == [[0, 1], [3, 2]]  # outside, among all


def test_other_calls_are_left_alone():
    with AmongKept(KEPT, 2) as choice:
        assert SCORES.topk(1).indices.tolist() == [[0], [3]]
        assert SCORES[None].topk(2).indices.tolist() == [[[0, 1], [3, 2]]]
        assert SCORES[:, :3].topk(2).indices.tolist() == [[0, 1], [2, 1]]
        assert SCORES.sum().item() == pytest.approx(2)
    assert choice.choices == 0


def test_gradients_reach_the_scores_that_were_chosen():
    scores = SCORES.clone().requires_grad_()
    with AmongKept(KEPT, 2):
        values = scores.topk(2).values
    values.sum().backward()
    assert scores.grad.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
