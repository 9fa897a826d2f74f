"""Balance within sequences and over devices, the entropy of routing, and the bias of the choice, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.algorithms.balance import (
    bias_directions,
    chosen_counts,
    chosen_counts_by_sequence,
    device_sums,
    entropy_sums,
    sequence_loss_sums,
    switch_loss,
    token_probabilities,
)


def test_counts_by_sequence():
    chosen = torch.tensor([[[0, 1], [1, 2], [0, 2]], [[0, 1], [0, 1], [2, 1]]])  # two layers, three tokens
    counted, sequence = torch.tensor([True, True, False]), torch.tensor([0, 1, 1])
    found = chosen_counts_by_sequence(chosen, counted, 3, sequence, 3)
    assert found.tolist() == [[[1, 1, 0], [0, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0], [0, 0, 0]]]
    assert torch.equal(found.sum(1), chosen_counts(chosen, counted, 3))


def one_hot_routing(experts, sequence, sequences, number=3):
    """Tokens that want and choose one expert each."""
    chosen = torch.tensor(experts)[:, None]
    probabilities = torch.nn.functional.one_hot(chosen[:, 0], number).float()
    counted = torch.ones(len(experts), dtype=torch.bool)
    return probabilities, chosen_counts_by_sequence(chosen, counted, number, sequence, sequences), sequence, 1


def test_even_over_the_batch_is_not_even_within_sequences():
    """Three sequences of different lengths: one is even (1), the others each have an expert of their own (3)."""
    sequence = torch.tensor([0, 0, 0, 1, 1, 2])
    routing = one_hot_routing([0, 1, 2, 1, 1, 0], sequence, 4)  # and a fourth without tokens, which adds nothing
    assert sequence_loss_sums(*routing).item() == pytest.approx(1 + 3 + 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 4), length=st.integers(1, 9))
def test_within_one_sequence_it_is_switchs_loss(seed, top_k, length):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, length, 4, generator=generator)
    counted = torch.rand(length, generator=generator) < 0.7
    chosen = logits.topk(top_k).indices
    zeros = torch.zeros(length, dtype=torch.int64)
    counts = chosen_counts_by_sequence(chosen, counted, 4, zeros, 1)
    probabilities = torch.where(counted[:, None], token_probabilities(logits, "softmax"), 0.0)
    found = sequence_loss_sums(probabilities, counts, zeros, top_k)
    tokens = max(1, int(counted.sum()))
    expected = switch_loss(counts[:, 0] / (top_k * tokens), probabilities.sum(1) / tokens)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_devices_are_successive_experts_and_may_be_uneven_within():
    load = torch.tensor([0.5, 0.0, 0.25, 0.25])
    assert device_sums(load, 2).tolist() == [0.5, 0.5]
    assert switch_loss(device_sums(load, 2), device_sums(load, 2)).item() == 1
    assert switch_loss(load, load).item() == 1.5
    one_device = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert switch_loss(device_sums(one_device, 2), device_sums(one_device, 2)).item() == 2  # as many as devices


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_entropy(scores):
    counted = torch.tensor([True, True, False])
    logits = torch.tensor([[2.0, 2.0, 2.0], [90.0, -90.0, -90.0], [0.0, 0.0, 0.0]]).requires_grad_()
    found = entropy_sums(logits, counted, scores)
    assert found.item() == pytest.approx(1)  # the first is undecided, the second sure, the third padding
    found.backward()
    assert torch.isfinite(logits.grad).all()
    sure = torch.tensor([[math.log(3.0), 0.0]])  # softmax 3/4 and 1/4, sigmoids 3/4 and 1/2, so 3/5 and 2/5
    part = 0.75 if scores == "softmax" else 0.6
    expected = -(part * math.log(part) + (1 - part) * math.log(1 - part)) / math.log(2)
    assert entropy_sums(sure, torch.tensor([True]), scores).item() == pytest.approx(expected)


def test_directions_are_exact():
    counts = torch.tensor([[3, 1, 2], [2**53 + 1, 2**53, 2**53 - 1], [0, 0, 0]])
    assert bias_directions(counts).tolist() == [[-1, 1, 0], [-1, 0, 1], [0, 0, 0]]
