import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.n_m_selection import keep_n_of_m


def test_two_of_four_by_hand():
    scores = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, -1.0, 0.5]])
    assert keep_n_of_m(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_equal_scores_keep_the_earlier():
    assert keep_n_of_m(torch.ones(1, 8), 2, 4).int().tolist() == [[1, 1, 0, 0] * 2]
    assert keep_n_of_m(torch.tensor([[0.0, -0.0, 0.0, 5.0]]), 2, 4).int().tolist() == [[1, 0, 0, 1]]


def test_along_the_first_dimension_it_is_the_transposed():
    scores = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    mask = keep_n_of_m(scores, 1, 4, dim=0)
    assert torch.equal(mask, keep_n_of_m(scores.t(), 1, 4).t())
    assert mask.is_contiguous()


def test_all_of_m_is_everything():
    assert keep_n_of_m(torch.randn(2, 4), 4, 4).all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_every_group_keeps_its_n_largest(n, m, rows, groups, levels):
    n = min(n, m)
    generator = torch.Generator().manual_seed(rows * 7 + groups)
    scores = torch.randint(-levels, levels + 1, (rows, groups * m), generator=generator).to(torch.bfloat16)
    before = scores.clone()
    mask = keep_n_of_m(scores, n, m)
    assert mask.dtype == torch.bool
    assert torch.equal(scores, before)
    for kept, values in zip(mask.reshape(-1, m), scores.reshape(-1, m).abs(), strict=True):
        order = sorted(range(m), key=lambda i: (-values[i].item(), i))
        assert kept.nonzero().flatten().tolist() == sorted(order[:n])


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4)])
def test_a_bad_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match=f"0 < N <= M, got {n}:{m}"):
        keep_n_of_m(torch.ones(1, 8), n, m)


def test_a_length_that_m_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, got 6 along dimension 0"):
        keep_n_of_m(torch.ones(6, 8), 2, 4, dim=0)
