"""Headers are read as safetensors reads them, and whatever is hostile or damaged is refused in one sentence."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_hf.storage import tensor_headers
from sparse_hf.storage.tensor_headers import StoredTensor, header_sha256, read_header, read_headers


TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.arange(3, dtype=torch.int8),
    "c": torch.zeros(0, 4),
    "d": torch.tensor(2.5),
}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file as an attacker would write it; `header` may be text that is no JSON."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "I8", shape: object = (4,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stored_bytes(tensor: StoredTensor) -> bytes:
    return tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.length]


def test_every_tensor_is_found_where_safetensors_wrote_it(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_headers(tmp_path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert stored_bytes(found[name]) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert {name: found[name].dtype for name in found} == {"a": "I8", "b": "BF16", "c": "F32", "d": "F32"}
    offsets = [tensor.offset for tensor in found.values()]
    assert offsets == sorted(offsets)


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "gone.safetensors"})
    assert list(read_headers(tmp_path)) == ["a"]


def test_shards_come_in_the_order_of_the_index_and_may_be_links(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "2.safetensors")
    (tmp_path / "blobs").mkdir()
    save_file({"b": TENSORS["b"], "d": TENSORS["d"]}, tmp_path / "blobs" / "f00")
    (tmp_path / "1.safetensors").symlink_to(tmp_path / "blobs" / "f00")  # as in the Hub's cache
    write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors", "d": "1.safetensors"})
    found = read_headers(tmp_path)
    assert [tensor.file.name for tensor in found.values()] == ["2.safetensors", "1.safetensors", "1.safetensors"]
    assert stored_bytes(found["a"]) == bytes([0, 1, 2])


def test_narrow_formats_are_measured_in_bits(tmp_path):
    header = {"x": entry("F4", [2, 3], [0, 3]), "y": entry("F6_E2M3", [4], [3, 6]), "z": entry("F8_E4M3", [2], [6, 8])}
    found = read_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert [tensor.length for tensor in found.values()] == [3, 3, 2]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry()}, bytes(3), "describes .* bytes, the file has"),
        ({"x": entry()}, bytes(5), "describes .* bytes, the file has"),
        ({"x": entry(), "y": entry(offsets=[2, 6])}, bytes(6), "`y` overlaps"),
        ({"x": entry(), "y": entry(offsets=[0, 4])}, bytes(4), "`y` overlaps"),
        ({"x": entry(), "y": entry(offsets=[5, 9])}, bytes(9), "`y` leaves a gap"),
        ({"x": entry(offsets=[0, 400], shape=[400])}, bytes(4), "describes .* bytes, the file has"),
        ({"x": entry("F32")}, bytes(4), r"F32 \[4\] cannot take 4 bytes"),
        ({"x": entry("F4", [7], [0, 4])}, bytes(4), "cannot take 4 bytes"),
        ({"x": entry("F128")}, bytes(4), "must be one of F4, .*got 'F128'"),
        ({"x": entry(None)}, bytes(4), "got None"),
        ({"x": entry(["I8"])}, bytes(4), "the dtype of `x`"),
        ({"x": entry(offsets=[4, 0])}, bytes(4), "the offsets of `x`"),
        ({"x": entry(offsets=[-4, 0])}, bytes(4), "the offsets of `x`"),
        ({"x": entry(offsets=[0, 2, 4])}, bytes(4), "the offsets of `x`"),
        ({"x": entry(offsets=[0, 4.0])}, bytes(4), "the offsets of `x`"),
        ({"x": entry(shape=[-4])}, bytes(4), "the shape of `x`"),
        ({"x": entry(shape=[True, 4])}, bytes(4), "the shape of `x`"),
        ({"x": entry(shape=[1] * 17 + [4])}, bytes(4), "the shape of `x`"),
        ({"x": entry(shape=[2**64, 0], offsets=[0, 0])}, b"", "the shape of `x`"),
        ({"x\n": entry()}, bytes(4), "no tensor name"),
        ({"x": [1]}, bytes(4), "`x` is described by"),
        ([1], b"", "must hold a JSON object, got a list"),
        ("{", b"", "not valid JSON"),
        ("[" * 100_000, b"", "not valid JSON"),
        ('{"x": {}, "x": {}}', b"", "'x' is there twice"),
    ],
)
def test_damaged_and_hostile_headers_are_refused(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 20])
def test_files_without_a_header_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not fit"):
        read_headers(tmp_path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "x.safetensors", {"x": entry()}, bytes(4))
    monkeypatch.setattr(tensor_headers, "LARGEST_HEADER", 10)
    with pytest.raises(ValueError, match="the 10 allowed"):
        read_header(path)


def test_every_truncation_is_refused_as_by_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass


@pytest.mark.parametrize(
    "shard",
    ["../1.safetensors", "/etc/1.safetensors", "sub/1.safetensors", "..", "", "sub\\1.safetensors", "C:1.safetensors"]
    + ["1.bin", "1\0.safetensors", "1" * 300 + ".safetensors", 7, None],
)
def test_the_index_names_only_files_of_its_folder(tmp_path, shard):
    (tmp_path / "sub").mkdir()
    write_raw(tmp_path / "sub" / "1.safetensors", {"x": entry()}, bytes(4))
    write_index(tmp_path / "sub", {"x": shard})
    with pytest.raises(ValueError, match="is no shard"):
        read_headers(tmp_path / "sub")


def test_index_and_shards_must_agree(tmp_path):
    write_raw(tmp_path / "1.safetensors", {"x": entry(), "y": entry(offsets=[4, 8])}, bytes(8))
    write_raw(tmp_path / "2.safetensors", {"y": entry()}, bytes(4))
    write_index(tmp_path, {"x": "1.safetensors", "y": "1.safetensors", "z": "1.safetensors"})
    with pytest.raises(ValueError, match="`z` is only in `model.safetensors.index.json`"):
        read_headers(tmp_path)
    write_index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors"})  # so `y` is there twice
    with pytest.raises(ValueError, match="`y` is only in `1.safetensors`"):
        read_headers(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match="weight_map"):
        read_headers(tmp_path)


def test_a_tensor_named_twice_in_the_index_is_refused(tmp_path):
    text = '{"weight_map": {"x": "1.safetensors", "x": "2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="'x' is there twice"):
        read_headers(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        read_headers(tmp_path)
    write_raw(tmp_path / "1.safetensors", {"x": entry()}, bytes(4))
    os.mkfifo(tmp_path / "3.safetensors")  # reading it would wait for ever
    write_index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors", "z": "3.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"2 of 3 are missing: \['2.safetensors', '3.safetensors'\]"):
        read_headers(tmp_path)
    with pytest.raises(FileNotFoundError, match="2.safetensors"):
        read_header(tmp_path / "2.safetensors")


def test_the_hash_is_of_the_header_alone(tmp_path):
    one = write_raw(tmp_path / "1", {"x": entry()}, b"abcd")
    other = write_raw(tmp_path / "2", {"x": entry()}, b"efgh")
    renamed = write_raw(tmp_path / "3", {"y": entry()}, b"abcd")
    assert header_sha256(one) == hashlib.sha256(one.read_bytes()[:-4]).hexdigest()
    assert header_sha256(one) == header_sha256(other) != header_sha256(renamed)
