"""Masks survive the disk bit for bit, at one bit each."""

import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.storage.mask_file import MASKS_FILE, load_bits, save_bits


def random_masks(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def save(path, masks):
    save_bits(
        path, {name: pack_bits(mask) for name, mask in masks.items()}, {n: tuple(m.shape) for n, m in masks.items()}
    )


def load(path):
    bits, shapes = load_bits(path)
    return {name: unpack_bits(bits[name], shapes[name]) for name in bits}


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
names = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@settings(max_examples=30)
@given(shapes=st.dictionaries(names, shapes, max_size=5), seed=st.integers(0, 100))
def test_round_trip(folder, shapes, seed):
    path = folder / MASKS_FILE
    masks = random_masks(shapes, seed)
    save(path, masks)
    loaded = load(path)
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_bits_and_names_by_hand(tmp_path):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    save(tmp_path / "m", {"blocks.my-block.0.weight": mask})
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert file.keys() == ["blocks.my-block.0.weight"]
        assert file.get_tensor("blocks.my-block.0.weight").tolist() == [0b10001101, 0b0010]
        assert file.metadata() == {"format": "sparse_hf.masks.v1", "shapes": '{"blocks.my-block.0.weight": [3, 4]}'}


def test_size_on_disk_is_one_bit_per_weight_and_the_header(tmp_path):
    shapes = {"a.weight": (30, 33), "b.weight": (7, 9, 5), "c.weight": (8, 8)}
    save(tmp_path / "m", random_masks(shapes))
    content = (tmp_path / "m").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    # ceil(990 / 8) + ceil(315 / 8) + 64 / 8
    assert len(content) == 8 + header + 124 + 40 + 8
    assert sum(math.ceil(math.prod(shape) / 8) for shape in shapes.values()) == 124 + 40 + 8


def test_loaded_masks_do_not_change_with_the_file(tmp_path):
    path = tmp_path / "m"
    mask = torch.ones(8, 8, dtype=torch.bool)
    save(path, {"a": mask})
    bits, _ = load_bits(path)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    assert bits["a"].tolist() == [255] * 8
    assert load_bits(path)[0]["a"].tolist() == [0] * 8


def test_a_link_is_followed(tmp_path):
    masks = random_masks({"a": (3, 5)})
    save(tmp_path / "blob", masks)
    (tmp_path / MASKS_FILE).symlink_to("blob")
    assert torch.equal(load(tmp_path / MASKS_FILE)["a"], masks["a"])


@pytest.mark.parametrize("path", ["absent", "."])
def test_missing_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=f"does not exist. A ticket folder holds `{MASKS_FILE}`"):
        load_bits(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("a/b", (2, 2)), ("a..b", (2, 2)), ("a" * 513, (2, 2)), ("a", (0, 2)), ("a", (1,) * 5), ("a", ())],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, name, shape):
    path: Path = tmp_path / "m"
    with pytest.raises(ValueError, match="Masks must belong to named matrices to be saved"):
        save(path, {name: torch.ones(shape, dtype=torch.bool)})
    assert not path.exists()


def test_the_same_masks_are_the_same_bytes(tmp_path):
    masks = random_masks({"encoder.b.weight": (3, 7), "encoder.a.weight": (5, 8), "größe": (2, 2)})
    written = set()
    for number in range(12):  # the package's own writer orders metadata by chance
        save(tmp_path / f"{number}.safetensors", masks)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1
    assert list(load(tmp_path / "0.safetensors")) == list(masks)
