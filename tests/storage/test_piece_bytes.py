"""Pieces make the bytes they promise, block by block; drawn numbers are normal and depend on their key alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.storage import piece_bytes
from sparse_hf.storage.piece_bytes import (
    NUMBERS_PER_BLOCK,
    SourceFiles,
    draw_block,
    piece_blocks,
    redrawn_lines,
    round_to_bf16,
)
from sparse_hf.storage.pieces import (
    AddLowRank,
    CopyBytes,
    CopyColumns,
    DrawNormal,
    FillZeros,
    GivenBytes,
    RedrawLines,
    Term,
    WeightedSum,
)


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BEFORE = b"four"  # so that offsets matter


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small matrices take several blocks."""
    monkeypatch.setattr(piece_bytes, "READ_BYTES", 24)
    monkeypatch.setattr(piece_bytes, "NUMBERS_PER_BLOCK", 8)
    monkeypatch.setattr(piece_bytes, "COMPUTED_NUMBERS", 16)


def random(shape, dtype="F32", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stored(folder, tensor, name="matrix"):
    (folder / name).write_bytes(BEFORE + raw(tensor))
    return CopyBytes(folder / name, len(BEFORE), len(raw(tensor)))


def columns_of(whole, tensor, first, count):
    size = tensor.element_size()
    return CopyColumns(whole.file, whole.offset + first * size, tensor.shape[0], tensor.shape[1] * size, count * size)


def made(piece, dtype="F32", shape=(-1,)):
    with SourceFiles() as sources:
        data = b"".join(piece_blocks(piece, sources))
    assert len(data) == piece.length
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)


def test_bytes_given_and_zeros_come_as_they_are(small_blocks):
    assert made(GivenBytes(raw(torch.arange(3.0)))).tolist() == [0, 1, 2]
    assert made(FillZeros(100)).tolist() == [0] * 25


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_columns_are_the_slice(tmp_path_factory, rows, columns, data):
    folder = tmp_path_factory.mktemp("columns")
    matrix = random((rows, columns), "BF16")
    first = data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - first))
    piece = columns_of(stored(folder, matrix), matrix, first, count)
    assert torch.equal(made(piece, "BF16", (rows, count)), matrix[:, first : first + count])
    # The same numbers when they are computed with, in blocks that begin and end within rows.
    halved = made(WeightedSum((Term(0.5, piece, "BF16"),), "BF16"), "BF16", (rows, count))
    assert torch.equal(halved, matrix[:, first : first + count] / 2)


def test_a_sum_is_rounded_once(tmp_path, small_blocks):
    one, two = random((5, 7), "BF16", 1), random((5, 7), "F32", 2)
    terms = (
        Term(0.25, stored(tmp_path, one, "one"), "BF16"),
        Term(-3.0, stored(tmp_path, two, "two"), "F32"),
        Term(1.0, DrawNormal(35, 0.1, "F32", "key"), "F32"),
    )
    exact = 0.25 * one.float() - 3.0 * two + made(terms[2].piece, "F32", (5, 7))
    for dtype, kind in DTYPES.items():
        assert torch.equal(made(WeightedSum(terms, dtype), dtype, (5, 7)), exact.to(kind))


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_redrawn_lines_have_the_moments_of_what_they_were(tmp_path, along, dtype):
    matrix = 3 + 2 * random((300, 400))
    matrix[::2] *= 5  # rows differ, so that the moments are those of the chosen lines
    matrix = matrix.to(DTYPES[dtype])
    piece = RedrawLines(stored(tmp_path, matrix), dtype, (300, 400), along, 0.5, "lines", "key")
    result, chosen = made(piece, dtype, (300, 400)), torch.from_numpy(redrawn_lines(piece))
    assert chosen.sum() == (150 if along == "rows" else 200)
    before, after = (one if along == "rows" else one.T for one in (matrix, result))
    assert torch.equal(before[~chosen], after[~chosen])
    lost, new = before[chosen].double(), after[chosen].double()
    assert abs(new.mean() - lost.mean()) < 4 * lost.std() / math.sqrt(lost.numel())
    assert abs(new.std() / lost.std() - 1) < 4 / math.sqrt(2 * lost.numel())
    assert (new == lost).float().mean() < 0.01


def test_the_choice_of_lines_and_the_draws_follow_their_keys(tmp_path, small_blocks):
    matrix = random((12, 12))
    piece = RedrawLines(stored(tmp_path, matrix), "F32", (12, 12), "rows", 0.5, "lines", "key")
    assert torch.equal(made(piece), made(piece))
    turned = dataclasses.replace(piece, along="columns", key="other")
    assert np.array_equal(redrawn_lines(piece), redrawn_lines(turned))
    assert not np.array_equal(redrawn_lines(piece), redrawn_lines(dataclasses.replace(piece, lines_key="b")))
    again = made(dataclasses.replace(piece, key="b")).view(12, 12)
    differs = torch.from_numpy(redrawn_lines(piece))
    assert ((again != made(piece).view(12, 12)).all(1) == differs).all()
    assert torch.equal(made(dataclasses.replace(piece, fraction=0.0)).view(12, 12), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_update_is_added_in_float32(tmp_path, small_blocks, dtype):
    matrix, left, right = random((9, 5), dtype), random((9, 2), seed=1), random((2, 5), seed=2)
    factors = stored(tmp_path, left, "left"), stored(tmp_path, right, "right")
    piece = AddLowRank(stored(tmp_path, matrix), dtype, (9, 5), *factors, 0.5)
    exact = (matrix.double() + 0.5 * left.double() @ right.double()).to(DTYPES[dtype])
    torch.testing.assert_close(made(piece, dtype, (9, 5)), exact)
    assert torch.equal(made(dataclasses.replace(piece, scale=0.0), dtype, (9, 5)), matrix)


def test_what_does_not_fit_together_is_refused(tmp_path):
    whole = stored(tmp_path, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"equally many numbers, got \[16, 32\]"):
        WeightedSum((Term(1.0, whole, "F32"), Term(1.0, whole, "BF16")), "F32")
    with pytest.raises(ValueError, match=r"shape \[4, 5\] cannot have 64 bytes"):
        RedrawLines(whole, "F32", (4, 5), "rows", 0.5, "a", "b")
    with pytest.raises(ValueError, match="must be in .0, 1., got 1.5"):
        RedrawLines(whole, "F32", (4, 4), "rows", 1.5, "a", "b")
    with pytest.raises(ValueError, match="factors of one rank"):
        AddLowRank(whole, "F32", (4, 4), whole, dataclasses.replace(whole, length=32), 1.0)
    with pytest.raises(ValueError, match="must be one of F32, BF16, F16 to be computed with, got 'I8'"):
        Term(1.0, whole, "I8")


def test_draws_of_no_distribution_are_refused():
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`std` must be"):
            DrawNormal(1, std, "F32", "k")
    with pytest.raises(ValueError, match="F32, BF16, F16 to be computed with, got 'I8'"):
        DrawNormal(1, 1.0, "I8", "k")


def drawn(piece: DrawNormal) -> bytes:
    return b"".join(draw_block(piece, block) for block in range(-(-piece.count // NUMBERS_PER_BLOCK)))


def test_draws_are_normal():
    count = 4 * NUMBERS_PER_BLOCK
    numbers = np.frombuffer(drawn(DrawNormal(count, 0.5, "F32", "router.0")), "<f4").astype(np.float64)
    assert abs(numbers.mean()) < 4 * 0.5 / math.sqrt(count)
    assert abs(numbers.std() / 0.5 - 1) < 4 / math.sqrt(2 * count)
    beyond = np.mean(np.abs(numbers) > 1.0)  # two standard deviations
    assert abs(beyond - 0.0455) < 4 * math.sqrt(0.0455 / count)


def test_blocks_and_keys_are_independent():
    piece = DrawNormal(2 * NUMBERS_PER_BLOCK + 5, 1.0, "F32", "a")
    blocks = [draw_block(piece, block) for block in (2, 0, 1)]
    assert blocks[1] + blocks[2] + blocks[0] == drawn(piece)
    assert len(blocks[0]) == 5 * 4
    shorter = dataclasses.replace(piece, count=NUMBERS_PER_BLOCK + 3)
    assert drawn(piece).startswith(drawn(shorter))
    first, second = (np.frombuffer(block, "<f4") for block in blocks[1:])
    other = np.frombuffer(draw_block(dataclasses.replace(piece, key="b"), 0), "<f4")
    for numbers in (second, other):
        assert abs(np.corrcoef(first, numbers)[0, 1]) < 4 / math.sqrt(NUMBERS_PER_BLOCK)


def test_narrow_draws_are_the_rounded_wide_ones():
    wide = torch.frombuffer(bytearray(draw_block(DrawNormal(1000, 0.02, "F32", "k"), 0)), dtype=torch.float32)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        narrow = torch.frombuffer(bytearray(draw_block(DrawNormal(1000, 0.02, dtype, "k"), 0)), dtype=kind)
        assert torch.equal(narrow, wide.to(kind))


def test_bf16_rounding_is_torchs():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.arange(0, 2**32, 65536 * 7, dtype=np.int64).astype(np.uint32) | np.uint32(0x8000)
    special = np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 1, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    numbers = np.concatenate([bits, ties, special]).view(np.float32)
    ours = round_to_bf16(numbers)
    theirs = torch.from_numpy(numbers.copy()).bfloat16()
    nan = np.isnan(numbers)
    assert nan.sum() > 100
    assert (ours[nan] == 0x7FC0).all()
    assert theirs.isnan().numpy()[nan].all()
    assert np.array_equal(ours[~nan], theirs.view(torch.uint16).numpy()[~nan])
