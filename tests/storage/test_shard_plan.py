"""Plans add up, are cut greedily and are told apart."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_hf.storage.pieces import CopyBytes, DrawNormal, FillZeros
from sparse_hf.storage.shard_plan import PlannedTensor, plan_digest, plan_shards


def zeros(name: str, count: int, dtype: str = "I8") -> PlannedTensor:
    size = {"I8": 1, "BF16": 2, "F32": 4}[dtype]
    return PlannedTensor(name, dtype, (count,), (FillZeros(count * size),))


def source(folder: Path, value: float = 0.0, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.full((4,), value)}, folder / name)
    return folder / name


def copied(file: Path) -> PlannedTensor:
    return PlannedTensor("x", "F32", (2,), (CopyBytes(file, file.stat().st_size - 16, 8),))


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
