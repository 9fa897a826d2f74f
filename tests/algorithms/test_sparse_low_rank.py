import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.algorithms.sparse_low_rank import sparse_low_rank
from sparse_hf.algorithms.supports import check_support, largest_support


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(seed, rows=48, columns=40, rank=3, nnz=12):
    """A matrix of this rank with `nnz` outliers on top, and where these are."""
    generator = seeded(seed)
    low_rank = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    support = torch.randperm(rows * columns, generator=generator)[:nnz].sort().values
    matrix = low_rank.clone()
    matrix.view(-1)[support] += 4.0 * (2 * torch.randint(2, (nnz,), generator=generator) - 1)
    return matrix, support


def recomposed(parts, shape):
    matrix = parts.u @ parts.v
    matrix.view(-1)[parts.support] += parts.values
    assert matrix.shape == shape
    return matrix


@pytest.mark.parametrize("seed", range(5))
def test_planted_outliers_are_found_though_they_are_not_the_largest_weights(seed):
    matrix, outliers = planted(seed)
    parts = sparse_low_rank(matrix, 12, 3, generator=seeded(seed), iterations=30)
    assert parts.support.equal(outliers)
    assert not largest_support(matrix, 12).equal(outliers)
    assert (recomposed(parts, matrix.shape) - matrix).norm() < 1e-3 * matrix.norm()


def test_without_entries_it_is_the_best_low_rank_part():
    matrix = torch.randn(12, 30, generator=seeded(), dtype=torch.float64)  # all 12 directions fit in the first guess
    parts = sparse_low_rank(matrix, 0, 4, generator=seeded())
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :4] * singular[:4]) @ right[:4]
    torch.testing.assert_close(parts.u @ parts.v, best)
    torch.testing.assert_close(parts.u.T @ parts.u, torch.eye(4, dtype=torch.float64))
    assert parts.support.numel() == parts.values.numel() == 0


def test_rank_zero_is_the_largest_weights():
    matrix = torch.randn(9, 7, generator=seeded())
    parts = sparse_low_rank(matrix, 10, 0, generator=seeded())
    assert parts.support.equal(largest_support(matrix, 10))
    assert parts.values.equal(matrix.flatten()[parts.support])
    assert (parts.u.shape, parts.v.shape) == ((9, 0), (0, 7))


def test_a_matrix_of_zeros_fills_up_from_the_lowest_index():
    parts = sparse_low_rank(torch.zeros(20, 30), 5, 2, generator=seeded())
    assert parts.support.tolist() == [0, 1, 2, 3, 4]
    assert parts.values.tolist() == [0.0] * 5
    assert not (parts.u @ parts.v).any()


def test_a_residual_with_too_few_entries_fills_up_to_the_count():
    # Rank 0 leaves two entries where four are asked for; the released code takes the whole matrix here.
    matrix = torch.zeros(5, 5)
    matrix[1, 2], matrix[3, 3] = 1.0, -2.0
    assert sparse_low_rank(matrix, 4, 0, generator=seeded()).support.tolist() == [0, 1, 7, 18]
    assert sparse_low_rank(matrix, 25, 1, generator=seeded()).support.tolist() == list(range(25))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 9), st.integers(0, 2**32), st.data())
def test_every_shape_gives_the_exact_count_the_same_each_time(rows, columns, rank, seed, data):
    nnz = data.draw(st.integers(0, rows * columns))
    matrix = torch.randn(rows, columns, generator=seeded(seed)) * data.draw(st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
    parts, again = (sparse_low_rank(matrix, nnz, rank, generator=seeded(seed + 1), iterations=2) for _ in range(2))
    check_support(parts.support, rows * columns)
    assert parts.support.numel() == nnz
    assert all(one.equal(other) for one, other in zip(parts, again, strict=True))
    inner = min(rank, rows, columns)
    assert (parts.u.shape, parts.v.shape) == ((rows, inner), (inner, columns))
    error = (recomposed(parts, matrix.shape) - matrix).flatten()[parts.support]
    assert (error.abs() <= 1e-5 * matrix.abs().max()).all()  # S holds what the low-rank part leaves


def test_half_precision_is_computed_in_fp32():
    matrix = planted(0)[0].bfloat16()
    half = sparse_low_rank(matrix, 12, 3, generator=seeded())
    full = sparse_low_rank(matrix.float(), 12, 3, generator=seeded())
    assert half.values.dtype == torch.float32
    assert all(one.equal(other) for one, other in zip(half, full, strict=True))


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_scale_of_the_weight_does_not_matter(scale):
    # Powers of two change no digit. The fp32 squares of such weights vanish or overflow.
    matrix = planted(1)[0]
    parts = sparse_low_rank(matrix, 12, 3, generator=seeded())
    scaled = sparse_low_rank(matrix * scale, 12, 3, generator=seeded())
    assert scaled.support.equal(parts.support)
    assert scaled.values.equal(parts.values * scale)
    assert scaled.v.equal(parts.v * scale)


def test_the_weight_is_read_row_by_row_and_left_alone():
    matrix, outliers = planted(2)
    weight = torch.nn.Parameter(matrix.T.contiguous().T)  # the same matrix, stored by columns
    before = weight.detach().clone()
    parts = sparse_low_rank(weight, 12, 3, generator=seeded(), iterations=30)
    assert parts.support.equal(outliers)
    assert not parts.values.requires_grad
    assert weight.equal(before)


def test_two_seeds_share_the_support_of_a_matrix_with_structure():
    generator = seeded()
    spectrum = torch.linspace(2.0, 0.2, 96) ** 2
    left, right = (torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q for _ in range(2))
    matrix = (left * spectrum) @ right
    one, other = (sparse_low_rank(matrix, 64, 8, generator=seeded(seed)).support for seed in (1, 2))
    assert torch.isin(one, other).sum() >= 60


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.full((2, 2), torch.inf)}, "`weight` must be finite, got 4 NaN or infinite values"),
        ({"weight": torch.tensor([[1.0, torch.nan]])}, "`weight` must be finite, got 1 NaN"),
        ({"weight": torch.ones(4)}, r"`weight` must be a floating matrix, got torch.float32 of shape \(4,\)"),
        ({"weight": torch.ones(2, 2, dtype=torch.int8)}, "`weight` must be a floating matrix, got torch.int8"),
        ({"nnz": 5}, r"`nnz` must be in 0..4, the number of weights, got 5"),
        ({"rank": -1}, "`rank` must be at least 0, got -1"),
        ({"iterations": 0}, "`iterations` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(changed, message):
    good = dict(weight=torch.ones(2, 2), nnz=1, rank=1, generator=seeded(), iterations=1)
    with pytest.raises(ValueError, match=message):
        sparse_low_rank(**(good | changed))


def test_seeds_agree_even_where_there_is_no_structure():
    matrix = torch.randn(128, 128, generator=seeded(7))
    first, second = (set(sparse_low_rank(matrix, 64, 8, generator=seeded(n)).support.tolist()) for n in (1, 2))
    assert len(first & second) >= 58  # with 2 power steps and 4 extra directions it is about 35
