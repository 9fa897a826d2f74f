"""Balance losses by hand."""

import math

import pytest
import torch

from sparse_hf.algorithms.balance import (
    chosen_counts,
    chosen_fractions,
    probability_sums,
    switch_loss,
    token_probabilities,
    z_loss_sums,
)


ALL = torch.ones(4, dtype=torch.bool)


def test_counts_leave_padding_out():
    chosen = torch.tensor([[0, 1], [1, 2], [0, 2]])
    counted = torch.tensor([True, True, False])
    assert chosen_counts(chosen, counted, 4).tolist() == [1, 2, 1, 0]
    assert chosen_counts(chosen.int(), ~counted, 4).tolist() == [1, 0, 1, 0]


def test_fractions_sum_to_one_for_every_top_k():
    counts = torch.tensor([[3, 1, 0, 0], [2, 2, 2, 2]])
    assert chosen_fractions(counts).tolist() == [[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    assert chosen_fractions(torch.zeros(1, 2)).tolist() == [[0, 0]]  # not NaN


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_even_load_is_one_and_a_collapse_is_experts_over_top_k(top_k):
    experts = 8
    even = torch.full((experts,), 1 / experts)
    assert switch_loss(even, even).item() == pytest.approx(1)
    collapsed = torch.zeros(experts)
    collapsed[:top_k] = 1 / top_k
    assert switch_loss(collapsed, collapsed).item() == pytest.approx(experts / top_k)


def test_layers_are_not_pooled():
    """Two layers that each collapsed onto another half: pooled they would look even."""
    fractions = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert switch_loss(fractions, fractions).tolist() == [2, 2]
    pooled = fractions.mean(0)
    assert switch_loss(pooled, pooled).item() == 1


def test_gradient_is_by_hand():
    """dL/dz = experts / tokens * p (f - <p, f>), and nothing reaches f."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator).requires_grad_()
    fractions = torch.tensor([0.5, 0.25, 0.25], requires_grad=True)
    switch_loss(fractions, probability_sums(logits, ALL, "softmax") / 4).backward()
    p, f = logits.detach().softmax(-1), fractions.detach()
    expected = 3 / 4 * p * (f - (p * f).sum(-1, keepdim=True))
    assert torch.allclose(logits.grad, expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(logits.grad.sum(-1), torch.zeros(4), atol=1e-7)
    assert fractions.grad is None


def test_probabilities_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])
    assert token_probabilities(logits, "softmax").tolist()[0] == pytest.approx([0.25, 0.75])
    assert token_probabilities(logits.bfloat16(), "softmax").dtype == torch.float32
    # Sigmoids 1/2 and 3/4: of their sum, 5/4, two and three fifths.
    assert token_probabilities(logits, "sigmoid").tolist()[0] == pytest.approx([0.4, 0.6])


def test_padding_adds_nothing():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([True, True, True, False])
    assert torch.allclose(probability_sums(logits, counted, "softmax"), logits[:, :3].softmax(-1).sum(-2))
    other = logits.clone()
    other[:, 3] = 100
    for sums in (lambda one: probability_sums(one, counted, "sigmoid"), lambda one: z_loss_sums(one, counted)):
        assert torch.equal(sums(logits), sums(other))


def test_z_loss_by_hand():
    """(ln experts)^2 where all logits are 0; its gradient is 2 logsumexp p."""
    logits = torch.zeros(4, 3, requires_grad=True)
    loss = z_loss_sums(logits, ALL) / 4
    assert loss.item() == pytest.approx(math.log(3) ** 2)
    loss.backward()
    assert torch.allclose(logits.grad, torch.full((4, 3), 2 * math.log(3) / 3 / 4))


def test_ranks_with_common_fractions_average_to_the_whole():
    """What every split rests on: with the whole batch's f the parts' losses average to that of the whole."""
    generator = torch.Generator().manual_seed(0)
    logits, chosen = torch.randn(8, 4, generator=generator), torch.randint(4, (8, 2), generator=generator)
    every = torch.ones(8, dtype=torch.bool)
    fractions = chosen_fractions(chosen_counts(chosen, every, 4))
    whole = switch_loss(fractions, probability_sums(logits, every, "softmax") / 8)
    parts = [switch_loss(fractions, probability_sums(one, ALL, "softmax") / 4) for one in logits.split(4)]
    assert sum(parts).item() / 2 == pytest.approx(whole.item())
