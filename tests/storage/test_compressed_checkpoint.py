import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_hf.storage.compressed_checkpoint import COMPRESSED_FILE, COMPRESSED_INDEX, is_compressed, read_forms
from sparse_hf.storage.compressed_writing import compress_weights, expand_weights
from sparse_hf.storage.safetensors_output import SafetensorsOutput
from sparse_hf.storage.tensor_headers import INDEX_FILE, SINGLE_FILE, read_header


def sparse(shape, kept=0.2, dtype=torch.float32):
    random = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=random).to(dtype)
    return values.masked_fill(torch.rand(shape, generator=random) >= kept, 0)


# Odd sizes, so that nothing lies at a multiple of its element size by chance.
TENSORS = {
    "a.weight": sparse((31, 33)),
    "b.weight": sparse((3, 17, 9), dtype=torch.bfloat16),
    "b.half": torch.ones(3, dtype=torch.bfloat16),
    "c.bias": torch.arange(7.0),
    "c.bytes": torch.arange(5, dtype=torch.uint8),
    "d.tiny": torch.zeros(2, dtype=torch.int8),
    "e.int8": sparse((40, 50), dtype=torch.int8),
    "f.float8": sparse((16, 64), 0.5).to(torch.float8_e4m3fn),
}


def folder(path, shards=1):
    path.mkdir()
    names = list(TENSORS)
    if shards == 1:
        save_file(TENSORS, path / SINGLE_FILE, metadata={"format": "pt"})
        return path
    placed = {
        name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)
    }
    for shard in set(placed.values()):
        save_file({name: TENSORS[name] for name in names if placed[name] == shard}, path / shard)
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return path


def new(path):
    path.mkdir()
    return path


def same_bits(one, other):
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.view(torch.uint8).equal(other.view(torch.uint8))
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back(tmp_path, shards):
    dense = folder(tmp_path / "dense", shards)
    small, back = new(tmp_path / "small"), new(tmp_path / "back")
    assert compress_weights(dense, small) == (COMPRESSED_FILE if shards == 1 else COMPRESSED_INDEX)
    assert expand_weights(small, back) == (SINGLE_FILE if shards == 1 else INDEX_FILE)
    found = {}
    for file in back.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in TENSORS.items())
    assert sum(file.stat().st_size for file in back.iterdir()) > sum(file.stat().st_size for file in small.iterdir())


def test_the_file_is_plain_safetensors_whose_tensors_lie_aligned(tmp_path):
    compress_weights(folder(tmp_path / "dense"), new(tmp_path / "small"))
    file = tmp_path / "small" / COMPRESSED_FILE
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == TENSORS.keys()
        assert opened.get_tensor("c.bias").equal(TENSORS["c.bias"])
        assert opened.get_slice("a.weight").get_dtype() == "U8"
    for tensor in read_header(file).values():
        assert tensor.offset % {"U8": 8, "F32": 4, "BF16": 2}.get(tensor.dtype, 1) == 0


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    dense = folder(tmp_path / "dense")
    for name in ("one", "two"):
        compress_weights(dense, new(tmp_path / name))
    assert (tmp_path / "one" / COMPRESSED_FILE).read_bytes() == (tmp_path / "two" / COMPRESSED_FILE).read_bytes()


def test_forms_are_read_without_weights(tmp_path):
    compress_weights(folder(tmp_path / "dense", 2), new(tmp_path / "small"))
    forms = read_forms(tmp_path / "small")
    assert {name: form.form for name, form in forms.items()} == {
        "a.weight": "bitmask",
        "b.weight": "bitmask",
        "b.half": "dense",
        "c.bias": "dense",
        "c.bytes": "plain",
        "d.tiny": "dense",
        "e.int8": "elias_fano",
        "f.float8": "bitmask",
    }
    assert forms["a.weight"].nonzeros == int(TENSORS["a.weight"].count_nonzero())
    assert forms["b.weight"].shape == (3, 17, 9)
    assert forms["b.weight"].dtype == "BF16"
    assert forms["c.bias"].nonzeros is None
    assert is_compressed(tmp_path / "small")
    assert not is_compressed(tmp_path / "dense")


@pytest.fixture
def small(tmp_path):
    compress_weights(folder(tmp_path / "dense"), new(tmp_path / "small"))
    return tmp_path / "small"


def test_truncated_anywhere(small, tmp_path):
    content = (small / COMPRESSED_FILE).read_bytes()
    for length in range(0, len(content), 61):
        (small / COMPRESSED_FILE).write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated, damaged or hostile"):
            read_forms(small)


def test_a_damaged_head_names_the_tensor_and_the_file(small):
    stored = read_header(small / COMPRESSED_FILE)["a.weight"]
    content = bytearray((small / COMPRESSED_FILE).read_bytes())
    content[stored.offset + 40 : stored.offset + 48] = struct.pack("<Q", 2**62)
    (small / COMPRESSED_FILE).write_bytes(content)
    for read in (lambda: read_forms(small), lambda: expand_weights(small, new(small.parent / "back"))):
        with pytest.raises(
            ValueError, match=r"`a.weight` in `.*compressed.safetensors`: A stored tensor is not usable"
        ):
            read()


def test_a_damaged_code_is_found_when_it_is_read(small):
    stored = read_header(small / COMPRESSED_FILE)["a.weight"]
    content = bytearray((small / COMPRESSED_FILE).read_bytes())
    content[stored.offset + stored.length - 16] ^= 1
    (small / COMPRESSED_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"`a.weight` .* (marks|spare)"):
        expand_weights(small, new(small.parent / "back"))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "x.bin", 3, None, "a/b.safetensors"])
def test_an_index_that_names_no_file_of_the_folder(tmp_path, shard):
    (tmp_path / COMPRESSED_INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="no shard"):
        read_forms(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`compressed.safetensors` or `compressed.safetensors.index.json`"):
        read_forms(tmp_path)
    (tmp_path / COMPRESSED_INDEX).write_text(
        json.dumps({"weight_map": {"a": "compressed-00001-of-00001.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match="1 of 1 are missing"):
        read_forms(tmp_path)


def test_a_tensor_that_was_not_announced_does_not_overwrite_the_data(tmp_path):
    with SafetensorsOutput(tmp_path / "x", {"a": (1,)}) as output:
        for number in range(9):
            output.append(f"a-long-name-{number}", "U8", (1,), [TENSORS["c.bytes"].numpy()[:1]])
        with pytest.raises(ValueError, match="announce all `shapes`"):
            output.finish()
