"""Plans add up, are cut greedily and are told apart; drawn numbers are normal and depend on their key alone."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_hf.storage.shard_plan import (
    NUMBERS_PER_BLOCK,
    CopyBytes,
    DrawNormal,
    FillZeros,
    PlannedTensor,
    draw_block,
    plan_digest,
    plan_shards,
    round_to_bf16,
)


def zeros(name: str, count: int, dtype: str = "I8") -> PlannedTensor:
    size = {"I8": 1, "BF16": 2, "F32": 4}[dtype]
    return PlannedTensor(name, dtype, (count,), (FillZeros(count * size),))


def source(folder: Path, value: float = 0.0, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.full((4,), value)}, folder / name)
    return folder / name


def copied(file: Path) -> PlannedTensor:
    return PlannedTensor("x", "F32", (2,), (CopyBytes(file, file.stat().st_size - 16, 8),))


def drawn(piece: DrawNormal) -> bytes:
    return b"".join(draw_block(piece, block) for block in range(-(-piece.count // NUMBERS_PER_BLOCK)))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["I8", "BF16", "F32"])), min_size=1, max_size=20),
    st.integers(1, 100),
)
def test_shards_are_cut_greedily_and_lose_nothing(kinds, limit):
    tensors = [zeros(f"t{number}", count, dtype) for number, (count, dtype) in enumerate(kinds)]
    shards = plan_shards(tensors, limit)
    order = {tensor.name: number for number, tensor in enumerate(tensors)}
    in_order = [sorted(shard.tensors, key=lambda tensor: order[tensor.name]) for shard in shards]
    assert [tensor for group in in_order for tensor in group] == tensors
    for group, following in zip(in_order, [*in_order[1:], None], strict=True):
        size = sum(tensor.length for tensor in group)
        assert group
        assert size <= limit or [tensor.length > limit for tensor in group if tensor.length] == [True]
        assert following is None or size + following[0].length > limit
    count = len(shards)
    expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [shard.name for shard in shards] == (expected if count > 1 else ["model.safetensors"])


def test_wider_dtypes_come_first_so_that_all_are_aligned():
    (shard,) = plan_shards([zeros("a", 3), zeros("b", 1, "BF16"), zeros("c", 5), zeros("d", 2, "F32")], 100)
    assert [tensor.name for tensor in shard.tensors] == ["d", "b", "a", "c"]
    header = shard.header()
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    content = json.loads(header[8:])
    assert content["__metadata__"] == {"format": "pt"}
    assert [content[name]["data_offsets"] for name in "dbac"] == [[0, 8], [8, 10], [10, 13], [13, 18]]
    assert shard.file_bytes() == len(header) + 18


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_names_are_used_once(name):
    with pytest.raises(ValueError, match=f"`{name}` twice"):
        plan_shards([zeros("a", 1), zeros(name, 1)], 10)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        plan_shards([], 10)
    with pytest.raises(ValueError, match="`max_shard_bytes` must be at least 1, got 0"):
        plan_shards([zeros("a", 1)], 0)


@pytest.mark.parametrize(
    ("dtype", "pieces", "message"),
    [
        ("F32", (FillZeros(8), FillZeros(7)), r"add up to 16 bytes for F32 \[2, 2\], got 15"),
        ("F32", (FillZeros(20), FillZeros(-4)), "add up to 16 bytes"),
        ("F32", (DrawNormal(8, 1.0, "BF16", "k"),), "`x` is F32, .* cannot be BF16"),
        ("F33", (), "must be one of F4, .* got 'F33'"),
    ],
)
def test_pieces_must_make_up_the_tensor(dtype, pieces, message):
    with pytest.raises(ValueError, match=message):
        PlannedTensor("x", dtype, (2, 2), pieces)


def test_draws_of_no_distribution_are_refused():
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`std` must be"):
            DrawNormal(1, std, "F32", "k")
    with pytest.raises(ValueError, match="F32, BF16, F16 to be drawn, got 'I8'"):
        DrawNormal(1, 1.0, "I8", "k")


def test_digest_follows_the_content_of_the_plan_and_not_its_place(tmp_path):
    digest = plan_digest(plan_shards([copied(source(tmp_path / "a"))], 100), {"seed": 1})
    assert len(digest) == 64
    assert digest == plan_digest(plan_shards([copied(source(tmp_path / "b"))], 100), {"seed": 1})
    plan = copied(source(tmp_path / "a"))
    others = [
        dataclasses.replace(plan, name="y"),
        dataclasses.replace(plan, shape=(1, 2)),
        dataclasses.replace(plan, dtype="I32"),
        dataclasses.replace(plan, pieces=(FillZeros(8),)),
        dataclasses.replace(plan, pieces=(dataclasses.replace(plan.pieces[0], offset=0),)),
        dataclasses.replace(plan, pieces=(DrawNormal(2, 1.0, "F32", "k"),)),
        dataclasses.replace(plan, pieces=(DrawNormal(2, 1.0, "F32", "l"),)),
        dataclasses.replace(plan, pieces=(DrawNormal(2, 2.0, "F32", "k"),)),
        copied(source(tmp_path / "c", name="other.safetensors")),
    ]
    digests = {plan_digest(plan_shards([other], 100), {"seed": 1}) for other in others}
    assert len(digests | {digest, plan_digest(plan_shards([plan], 100), {"seed": 2})}) == len(others) + 2


def test_digest_tells_two_sources_of_one_name_apart(tmp_path):
    one, two = copied(source(tmp_path / "a", 1.0)), copied(source(tmp_path / "b", 2.0))
    same = [one, dataclasses.replace(one, name="y")]
    mixed = [one, dataclasses.replace(two, name="y")]
    assert plan_digest(plan_shards(same, 100), {}) != plan_digest(plan_shards(mixed, 100), {})


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
