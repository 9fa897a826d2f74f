import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.algorithms.supports import (
    check_support,
    largest_support,
    line_support,
    move_support,
    random_support,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_largest_support_by_hand():
    scores = torch.tensor([[0.5, -3.0, 1.0], [2.0, 0.0, -1.0]])
    assert largest_support(scores, 2).tolist() == [1, 3]
    assert largest_support(scores, 3).tolist() == [1, 2, 3]  # of the tied 1.0 and -1.0 the lower index
    assert largest_support(scores, 0).tolist() == []
    assert largest_support(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert largest_support(torch.zeros(4, 4), 3).tolist() == [0, 1, 2]


def test_half_precision_and_strides_make_no_difference():
    scores = torch.randn(8, 6, generator=seeded()).bfloat16()
    expected = largest_support(scores.float(), 9)
    assert expected.dtype == torch.int64
    assert largest_support(scores, 9).equal(expected)
    assert largest_support(scores.T.contiguous().T, 9).equal(expected)
    assert largest_support(torch.nn.Parameter(scores), 9).equal(expected)


# Few distinct values, so that many tie.
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=30), st.data())
def test_largest_support_chooses_as_keep_largest(values, data):
    scores = torch.tensor(values)
    nnz = data.draw(st.integers(0, len(values)))
    (mask,) = keep_largest([scores], nnz, absolute=True, min_per_tensor=0)
    assert largest_support(scores, nnz).tolist() == mask.nonzero().flatten().tolist()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32), st.data())
def test_random_support_has_the_count_and_follows_the_seed(rows, columns, seed, data):
    nnz = data.draw(st.integers(0, rows * columns))
    support = random_support((rows, columns), nnz, seeded(seed))
    check_support(support, rows * columns)
    assert support.numel() == nnz
    assert support.equal(random_support((rows, columns), nnz, seeded(seed)))


@pytest.mark.parametrize("nnz", [2, 4])  # drawn piece by piece, and as a permutation
def test_random_support_draws_every_position_equally_often(nnz):
    generator = seeded()
    drawn = torch.cat([random_support((2, 3), nnz, generator) for _ in range(3000)])
    counts = drawn.bincount(minlength=6)
    # mean 3000 * nnz / 6, standard deviation at most sqrt(3000 / 4) = 27: five of them
    assert (counts - 500 * nnz).abs().max() < 137


def test_rows_and_columns_by_hand():
    # squared norms: rows 5, 9, 5; columns 14, 5
    scores = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [2.0, -1.0]])
    assert line_support(scores, 2, "rows").tolist() == [2, 3]
    assert line_support(scores, 4, "rows").tolist() == [0, 1, 2, 3]  # rows 0 and 2 tie
    assert line_support(scores, 3, "columns").tolist() == [0, 2, 4]
    assert (
        line_support(scores, 6, "columns").tolist() == line_support(scores, 6, "rows").tolist() == [0, 1, 2, 3, 4, 5]
    )
    assert line_support(scores, 0, "columns").tolist() == line_support(scores, 0, "rows").tolist() == []


def test_norms_of_lines_do_not_overflow():
    scores = torch.tensor([[1e30, 0.0], [2e30, 0.0]])
    assert line_support(scores, 2, "rows").tolist() == [2, 3]


@pytest.mark.parametrize(
    ("lines", "shape", "nnz", "values"),
    [
        ("rows", (3, 4), 6, "4 and 8"),
        ("columns", (3, 4), 2, "0 and 3"),
        ("rows", (3, 4), 11, "8 and 12"),
    ],
)
def test_broken_lines_name_the_nearest_counts(lines, shape, nnz, values):
    with pytest.raises(ValueError, match=f"got {nnz}: the nearest valid values are {values}."):
        line_support(torch.ones(shape), nnz, lines)


def test_move_by_hand():
    indices, values = torch.tensor([1, 4, 6, 9]), torch.tensor([0.1, -5.0, 0.2, 3.0])
    candidates, gradients = torch.tensor([0, 1, 5, 8]), torch.tensor([0.5, 9.0, -2.0, 1.0])
    moved = move_support(indices, values, candidates, gradients, numel=10, drop_fraction=0.5)
    # 1 and 6 are dropped; 1 has the largest gradient but was just dropped, so 5 and 8 grow.
    assert moved.indices.tolist() == [4, 5, 8, 9]
    assert moved.origin.tolist() == [1, -1, -1, 3]


def test_ties_keep_and_grow_the_lowest_index():
    ones = torch.ones(3)
    moved = move_support(torch.tensor([2, 4, 6]), ones, torch.tensor([1, 3, 5]), ones, numel=7, drop_fraction=0.34)
    assert moved.indices.tolist() == [1, 2, 4]
    assert moved.origin.tolist() == [-1, 0, 1]


def test_no_more_is_dropped_than_can_grow():
    indices, candidates = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])
    values, gradients = torch.tensor([3.0, 1.0, 2.0]), torch.zeros(4)
    moved = move_support(indices, values, candidates, gradients, numel=4, drop_fraction=1.0)
    assert moved.indices.tolist() == [0, 2, 3]
    assert moved.origin.tolist() == [0, 2, -1]
    stays = move_support(indices, values, candidates[:3], gradients[:3], numel=4, drop_fraction=1.0)
    assert stays.indices.tolist() == [0, 1, 2]
    assert stays.origin.tolist() == [0, 1, 2]


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32), st.data())
def test_moves_keep_the_count_and_name_every_origin(numel, drop_fraction, seed, data):
    generator = seeded(seed)
    indices = random_support((numel,), data.draw(st.integers(0, numel)), generator)
    candidates = random_support((numel,), data.draw(st.integers(0, numel)), generator)
    values, gradients = (torch.randn(ids.shape, generator=generator) for ids in (indices, candidates))
    moved = move_support(indices, values, candidates, gradients, numel=numel, drop_fraction=drop_fraction)
    check_support(moved.indices, numel)
    assert moved.indices.shape == moved.origin.shape == indices.shape
    carried = moved.origin >= 0
    assert moved.indices[carried].equal(indices[moved.origin[carried]])
    new = set(moved.indices[~carried].tolist())
    free = set(candidates.tolist()) - set(indices.tolist())
    assert new <= free
    assert len(new) == min(round(drop_fraction * indices.numel()), len(free))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([1, 6]), "must be in 0..5, the weights of the matrix, got 6"),
        (torch.tensor([-1, 2]), "must be in 0..5, the weights of the matrix, got -1"),
        (torch.tensor([0, 3, 3]), "must not repeat, got 3 more than once"),
        (torch.tensor([4, 2]), "must be sorted, got 2 after 4"),
        (torch.tensor([0.0, 2.0]), "must be a 1-D int32 or int64 tensor, got torch.float32"),
        (torch.tensor([[0, 2]]), r"must be a 1-D int32 or int64 tensor, got torch.int64 of shape \(1, 2\)"),
    ],
)
def test_what_is_no_support_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        check_support(indices, 6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`nnz` must be in 0..4, the number of weights, got 5"):
        largest_support(torch.ones(2, 2), 5)
    with pytest.raises(ValueError, match=r"`nnz` must be in 0..4, the number of weights, got -1"):
        random_support((2, 2), -1, seeded())
    with pytest.raises(ValueError, match="`scores` must be finite, got 1 NaN"):
        largest_support(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="`scores` must be floating, got torch.int64"):
        largest_support(torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="`scores` must be a matrix"):
        line_support(torch.ones(4), 4, "rows")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drop_fraction": 1.1}, r"`drop_fraction` must be in \[0, 1\], got 1.1"),
        ({"values": torch.ones(3)}, "`values` must be one per entry of `indices`"),
        ({"gradients": torch.ones(1)}, "`gradients` must be one per entry of `candidates`"),
        ({"candidates": torch.tensor([2, 2])}, "`candidates` must not repeat"),
        ({"numel": 2}, "`indices` must be in 0..1"),
    ],
)
def test_a_bad_move_is_refused(changed, message):
    two = torch.tensor([0, 2])
    good = dict(indices=two, values=torch.ones(2), candidates=two, gradients=torch.ones(2), numel=4, drop_fraction=0.5)
    with pytest.raises(ValueError, match=message):
        move_support(**(good | changed))
