"""Every broken or hostile mask file is refused in one sentence, without a crash and without much memory."""

import json
import resource
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.storage.mask_file import FORMAT, LONGEST_NAME, load_bits, save_bits


SHAPES = {"layer.0.weight": (3, 5), "layer.1.weight": (4, 4)}


def valid_bytes(folder):
    path = folder / "valid"
    masks = {name: torch.arange(shape[0] * shape[1]).reshape(shape) % 3 == 0 for name, shape in SHAPES.items()}
    save_bits(path, {name: pack_bits(mask) for name, mask in masks.items()}, SHAPES)
    return path.read_bytes()


def refused(path, reason=None):
    """The one sentence with which `load_bits` refuses the file."""
    with pytest.raises(ValueError, match=reason) as caught:
        load_bits(path)
    message = str(caught.value)
    assert message.startswith(f"`{path}` is not a usable mask file: ")
    assert len(message) < 1000
    return message


def hostile(folder, tensors, shapes, **metadata):
    path = folder / "hostile"
    text = shapes if isinstance(shapes, str) else json.dumps(shapes)
    save_file(tensors, path, metadata={"format": FORMAT, "shapes": text, **metadata})
    return path


def test_truncated_at_every_byte(tmp_path):
    content = valid_bytes(tmp_path)
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"garbage" * 50, b"\xff" * 100, b"PK\x03\x04" * 20])
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage"
    path.write_bytes(content)
    refused(path)


def test_trailing_bytes(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(valid_bytes(tmp_path) + b"\x00")
    refused(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 99_999_999])
def test_header_length_bomb(tmp_path, length):
    path = tmp_path / "bomb"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


@pytest.mark.parametrize("name", ["sparse_hf.masks.v2", "", "pt", "x" * 10**6])
def test_wrong_format(tmp_path, name):
    refused(hostile(tmp_path, {"a": torch.zeros(1, dtype=torch.uint8)}, {"a": [2, 2]}, format=name), "says format")


def test_safetensors_without_metadata(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "model")
    refused(tmp_path / "model", "says format None")


@pytest.mark.parametrize(
    "shapes",
    ["", "{", "[]", "null", "3", '"a"', '{"b": [2, 2]}', '{"a": [2, 2], "b": [2, 2]}', "[" * 10**6]
    + ['{"a": [' + "9" * 5000 + "]}"],
    ids=lambda text: text[:20],
)
def test_shapes_that_do_not_name_the_tensors(tmp_path, shapes):
    refused(hostile(tmp_path, {"a": torch.zeros(1, dtype=torch.uint8)}, shapes), "the shapes in its header")


@pytest.mark.parametrize(
    "shape",
    ["[]", "[0, 8]", "[-2, -4]", "[true, 8]", "[2.0, 4]", "[[2, 4]]", '"24"', "null", '{"2": 4}', "[1, 1, 1, 2, 4]"]
    + ["[NaN, 8]", "[1e400, 8]", "[1099511627776, 8]", "[" * 500 + "]" * 500, "8"],
    ids=lambda text: text[:20],
)
def test_wrong_shape(tmp_path, shape):
    path = hostile(tmp_path, {"a": torch.zeros(1, dtype=torch.uint8)}, f'{{"a": {shape}}}')
    refused(path, "the shape of `a` is")


@pytest.mark.parametrize("shape", [[2**39, 2**39, 2**39, 2**39], [2**39], [3, 3], [65536, 65536]])
def test_shape_that_does_not_fit_the_bytes(tmp_path, shape):
    path = hostile(tmp_path, {"a": torch.zeros(1, dtype=torch.uint8)}, {"a": shape})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "the mask of `a` must be")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, dtype=torch.int8), torch.zeros(1, dtype=torch.bool), torch.zeros(1), torch.zeros(1, 1).byte()]
    + [torch.zeros(2, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",
)
def test_tensor_that_is_no_packed_mask(tmp_path, tensor):
    refused(hostile(tmp_path, {"a": tensor}, {"a": [2, 4]}), "the mask of `a` must be 1 bytes for the shape")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\x00b", "a\nb", "\x1b[2J", "a..b", ".a", "a."]
    + ["a" * (LONGEST_NAME + 1), "a" * 10_000],
    ids=lambda name: repr(name)[:20],
)
def test_hostile_names(tmp_path, name):
    path = hostile(tmp_path, {name: torch.zeros(1, dtype=torch.uint8)}, {name: [2, 4]})
    message = refused(path, "is not a parameter name")
    assert message.isprintable()


@pytest.mark.parametrize("last", [0b10000, 0b1000, 0b11111000, 0b10000000])
def test_spare_bits(tmp_path, last):
    path = hostile(tmp_path, {"a": torch.tensor([last], dtype=torch.uint8)}, {"a": [1, 3]})
    refused(path, "the spare bits of `a` must be zero")


def raw(folder, header, data):
    path = folder / "raw"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


META = b'"__metadata__":{"format":"%s","shapes":"{\\"a\\": [2, 4]}"}' % FORMAT.encode()
ONE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def test_the_raw_header_of_these_tests_is_valid(tmp_path):
    bits, shapes = load_bits(raw(tmp_path, b"{%s,%s}" % (META, ONE), b"\x05"))
    assert bits["a"].tolist() == [5]
    assert shapes == {"a": (2, 4)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{%s,%s,%s}" % (META, META, ONE), b"\x05"),
        (b'{%s,"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},%s}' % (META, ONE), b"\x05" * 9),
        (b'{%s,"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}' % META, b"\x05"),
        (b'{%s,"a":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}' % META, b"\x05" * 6),
        (b'{%s,"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,1]}}' % META, b"\x05"),
        (b'{%s,"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}}' % META, b"\x05"),
        (b'{"__metadata__":{"format":3},%s}' % ONE, b"\x05"),
        (b'{"__metadata__":null,%s}' % ONE, b"\x05"),
        (b"[1]", b""),
        (b"[" * 100_000, b""),
    ],
    ids=["two metadata", "two entries", "backwards", "hole", "overflow", "dtype", "metadata", "null", "list", "deep"],
)
def test_hostile_header(tmp_path, header, data):
    refused(raw(tmp_path, header, data))


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    return path, valid_bytes(path)


@settings(max_examples=200)
@given(data=st.data())
def test_flipped_or_cut_bytes_load_as_masks_or_are_refused(valid_file, data):
    folder, valid = valid_file
    content = bytearray(valid)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] ^= data.draw(st.integers(1, 255))
    path = folder / "fuzzed"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        bits, shapes = load_bits(path)
    except ValueError:
        refused(path)
    else:
        for name, shape in shapes.items():
            assert unpack_bits(bits[name], shape).shape == shape
