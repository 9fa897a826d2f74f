"""What experts tell about classes: by hand, and what chance alone does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.specialisation import information_by_chance, mutual_information, specialisation


def counts(*layers):
    """(classes, layers, experts) of one (classes, experts) table per layer."""
    return torch.tensor(layers).transpose(0, 1)


def test_by_hand():
    told = [[50, 0], [0, 50]]  # the expert is the class
    nothing = [[30, 20], [30, 20]]
    half = [[50, 0], [25, 25]]
    joint, experts = [0.5, 0.25, 0.25], [0.75, 0.25]
    bits = 1 - sum(p * math.log2(p) for p in experts) + sum(p * math.log2(p) for p in joint)
    assert mutual_information(counts(told, nothing, half)).tolist() == pytest.approx([1, 0, bits])


def test_what_there_is_to_know():
    found = specialisation(counts([[60, 20], [0, 0], [10, 10]]), top_k=1)  # a class without tokens is none
    assert found.class_entropy == pytest.approx(-(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2)))
    assert found.by_chance.tolist() == pytest.approx([1 / (2 * math.log(2) * 100)])
    with pytest.raises(ValueError, match="at least one counted token"):
        specialisation(torch.zeros(2, 1, 4), top_k=1)


@given(st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=3, max_size=3))
def test_bounds(table):
    table[0][0] += 1
    both = specialisation(counts(table), top_k=1)
    assert 0 <= both.information.item() <= min(both.class_entropy, 2) + 1e-9
    # Classes and experts in another order tell the same.
    assert mutual_information(counts(table[::-1])).item() == pytest.approx(both.information.item(), abs=1e-9)


@pytest.mark.parametrize(("classes", "experts", "top_k"), [(2, 8, 2), (4, 8, 7), (3, 16, 1)])
def test_chance(classes, experts, top_k):
    """200 datasets of 300 tokens with evenly random choices."""
    tokens, repeats = 300, 200
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(repeats, tokens, experts, generator=generator).topk(top_k).indices
    labels = torch.randint(classes, (repeats, tokens, 1), generator=generator)
    cells = torch.nn.functional.one_hot((labels * experts + chosen).flatten(1), classes * experts).sum(1)
    tables = cells.view(repeats, classes, experts).transpose(0, 1)
    measured = mutual_information(tables).mean().item()
    assert measured == pytest.approx(information_by_chance(classes, experts, top_k, tokens), rel=0.1)
    assert information_by_chance(classes, experts, experts, tokens) == 0
