"""Ranks and similarities, by hand and against NumPy's definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.representation_collapse import (
    CHUNK,
    Spread,
    effective_rank,
    mean_off_diagonal,
    output_similarity,
    weight_similarity,
)


def covariance(rows, *sizes):
    spread = Spread()
    for part in torch.as_tensor(rows, dtype=torch.float32).split(list(sizes) or [len(rows)]):
        spread.add(part)
    return spread.covariance()


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.diag(torch.tensor([4.0, 0, 0]))) == pytest.approx(1)
    # Singular values 3 and 1: parts 3/4 and 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([9.0, 1.0]))) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.zeros(3, 3)) == 1


def test_rows_on_a_line_have_rank_one_wherever_it_lies():
    assert effective_rank(covariance([[100, 7, 1], [101, 9, 1], [103, 13, 1]])) == pytest.approx(1, abs=1e-3)
    assert effective_rank(covariance([[5, 5]] * 4)) == 1
    square = [[1000, 0], [1001, 0], [1000, 1], [1001, 1]]
    assert effective_rank(covariance(square)) == pytest.approx(2)


@given(st.integers(0, 30), st.integers(1, 19))
def test_spread_is_the_covariance_in_any_batches(seed, first):
    """Also where the mean is a thousand times the deviation."""
    rows = 1000 + torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    expected = np.cov(rows.double().numpy().T, bias=True)
    assert covariance(rows, first, 20 - first).numpy() == pytest.approx(expected, abs=1e-4)
    values = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), compute_uv=False)
    parts = values / values.sum()
    assert effective_rank(covariance(rows)) == pytest.approx(np.exp(-(parts * np.log(parts)).sum()), rel=1e-4)


def test_no_rows():
    spread = Spread()
    spread.add(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="at least one row"):
        spread.covariance()
    spread.add(torch.ones(2, 3))
    assert spread.rows == 2


def test_weight_similarity_by_hand():
    up = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])
    down = torch.tensor([[1.0], [1.0], [0.0]])
    half = pytest.approx(0.5)
    assert weight_similarity([up, down]).tolist() == [
        [pytest.approx(1), half, 0],
        [half, pytest.approx(1), 0],
        [0] * 3,
    ]


def test_weight_similarity_in_blocks(monkeypatch):
    stack = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = weight_similarity([stack])
    monkeypatch.setattr("sparse_hf.algorithms.representation_collapse.CHUNK", 12)
    assert torch.allclose(weight_similarity([stack]), whole)
    assert CHUNK >= 2**20
    assert torch.allclose(weight_similarity([stack.bfloat16()]), whole, atol=0.02)


def test_output_similarity_by_hand():
    """Two tokens: opposite on the first, orthogonal on the second; lengths do not matter."""
    outputs = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[-5.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 0.0]]])
    assert output_similarity(outputs).tolist() == [[1, -0.5, 0.5], [-0.5, 1, 0], [0.5, 0, 0.5]]


def test_mean_off_diagonal():
    similarity = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[9.0, 0.0], [1.0, 9.0]]])
    assert mean_off_diagonal(similarity).tolist() == [0.5, 0.5]
    assert mean_off_diagonal(torch.ones(1, 1)).isnan()
