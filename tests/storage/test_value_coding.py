"""Values coded by zstd come back bit for bit, take less where they can, and hostile planes are one clear error."""

import math
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.storage.compressed_tensor import compress_tensor, expand_tensor
from sparse_hf.storage.stored_form import HEAD, read_form
from sparse_hf.storage.tensor_headers import DTYPE_BITS
from sparse_hf.storage.value_coding import MOST_PER_BYTE, check_zstd, code_values, decode_values


zstandard = pytest.importorskip("zstandard")


def weights(dtype, shape, kept, seed=0):
    """Normal numbers, whose exponents are few, as the bytes of a tensor."""
    random = np.random.default_rng(seed)
    values = np.where(random.random(shape) < kept, random.normal(0, 0.02, shape), 0).astype("<f4")
    if dtype == "BF16":
        return np.ascontiguousarray(values.view("<u2").reshape(-1, 2)[:, 1]).view(np.uint8)
    return values.reshape(-1).view(np.uint8)


def stored(data, dtype, shape):
    return np.concatenate(compress_tensor(data, dtype, shape, zstd=True))


@settings(max_examples=40)
@given(
    st.sampled_from(["<u1", "<u2", "<u4", "<u8"]),
    st.integers(0, 3000),
    st.sampled_from([1, 3, 200, 2**32]),
)
def test_what_is_coded_comes_back_and_is_smaller(kind, count, largest):
    values = np.random.default_rng(count).integers(0, largest, count, np.uint64).astype(kind)
    planes = code_values(np.array_split(values, 3))
    if planes is not None:
        assert sum(map(len, planes)) < values.nbytes
        back = np.empty_like(values)
        decode_values(np.concatenate(planes), [len(plane) for plane in planes], back)
        assert (back == values).all()


def test_random_bytes_stay_as_they_are():
    assert code_values([np.random.default_rng(0).integers(0, 2**32, 5000, np.uint64).astype("<u4")]) is None


@pytest.mark.parametrize(("dtype", "share"), [("BF16", 0.70), ("F32", 0.86)])
@pytest.mark.parametrize(("kept", "form"), [(0.5, "bitmask"), (0.1, "elias_fano"), (1.0, "plain")])
def test_exponents_are_coded_in_every_form(dtype, share, kept, form):
    data = weights(dtype, (256, 300), kept)
    plain = compress_tensor(data, dtype, (256, 300))
    coded = stored(data, dtype, (256, 300))
    back, found = expand_tensor(coded)
    assert back.tobytes() == data.tobytes()
    assert (found.form, found.full_name, found.shape) == (form, f"{form}+zstd", (256, 300))
    width, count = DTYPE_BITS[dtype] // 8, kept * 256 * 300
    places = 0 if form == "plain" else sum(map(len, plain)) - width * count
    assert len(coded) <= 1.03 * (share * width * count + places)


def test_two_of_four_and_bytes_in_a_row_are_coded_too():
    mask = np.tile([1, 0, 1, 0, 0, 1, 1, 0], 4000).astype(bool)
    data = np.where(mask[:, None], weights("BF16", (32_000,), 1.0).reshape(-1, 2), 0).astype(np.uint8).ravel()
    row = np.arange(4096, dtype=np.uint32).astype(np.uint8) % 5
    for given_data, dtype, shape, form in ((data, "BF16", (100, 320), "n_of_4"), (row, "U8", (4096,), "plain")):
        back, found = expand_tensor(stored(given_data, dtype, shape))
        assert found.full_name == f"{form}+zstd"
        assert back.tobytes() == given_data.tobytes()


def test_what_zstd_does_not_help_is_stored_as_without_it():
    random = np.random.default_rng(0).integers(1, 256, (5000, 4), np.uint8)
    random[::2] = 0
    plain = np.concatenate(compress_tensor(random.ravel(), "F32", (5000,)))
    assert (stored(random.ravel(), "F32", (5000,)) == plain).all()


DATA = weights("BF16", (40, 70), 0.5)
VALID = stored(DATA, "BF16", (40, 70))
FORM = read_form(VALID[:200].tobytes(), len(VALID))
LENGTHS = HEAD.size + 16  # where the lengths of the planes are


def refused(content, most_elements=None):
    with pytest.raises(ValueError, match="A stored tensor is not usable") as caught:
        expand_tensor(np.frombuffer(bytes(content), np.uint8), most_elements)
    return str(caught.value)


def with_lengths(*lengths):
    content = bytearray(VALID.tobytes())
    content[LENGTHS : LENGTHS + 16] = struct.pack("<2Q", *lengths)
    return content


@pytest.mark.parametrize(
    "lengths",
    [(0, sum(FORM.planes)), (FORM.nonzeros + 8, FORM.planes[1]), (2**64 - 1, 2**64 - 1), (FORM.planes[0], 1)],
)
def test_lengths_that_lie(lengths):
    assert any(text in refused(with_lengths(*lengths)) for text in ("cannot be", "cannot take"))


def test_truncated_at_every_length():
    for length in range(0, len(VALID), 7):
        assert "truncated" in refused(VALID[:length].tobytes())


def test_a_plane_that_says_it_is_longer_is_refused_before_anything_is_allocated():
    bomb = zstandard.ZstdCompressor().compress(bytes(2**24))  # one byte for more than a thousand
    plane = bomb + bytes(FORM.planes[1] - len(bomb)) if len(bomb) <= FORM.planes[1] else bomb[: FORM.planes[1]]
    content = bytearray(VALID.tobytes())
    begin = LENGTHS + 16 + FORM.planes[0]
    content[begin : begin + FORM.planes[1]] = plane
    assert f"says that it is {2**24} bytes" in refused(content)


def test_a_small_file_cannot_claim_to_be_huge():
    size = 2**36
    head = HEAD.pack(b"sparsehf", b"plain+zstd", b"BF16", 1, size) + struct.pack("<3Q", size, 100, 100)
    assert "cannot be 100 bytes" in refused(head + bytes(200))
    same = np.full(MOST_PER_BYTE * 1000, 7, np.uint8)  # zstd would take less than a byte for a thousand
    assert compress_tensor(same, "I8", same.shape, zstd=True) is None


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_refused_or_give_a_tensor(flips):
    content = bytearray(VALID.tobytes())
    for place, change in flips:
        content[place] ^= change
    try:
        data, form = expand_tensor(np.frombuffer(bytes(content), np.uint8))
    except ValueError:
        refused(content)
    else:
        assert len(data) == form.dense_bytes == math.prod(form.shape) * DTYPE_BITS[form.dtype] // 8


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse_hf\[zstd\]'"):
        check_zstd()
    with pytest.raises(ImportError, match="not installed"):
        expand_tensor(VALID)
