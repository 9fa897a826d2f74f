import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.storage.compressed_tensor import compress_tensor, expand_tensor
from sparse_hf.storage.stored_form import HEAD, MAGIC, read_form
from sparse_hf.storage.tensor_headers import DTYPE_BITS


pytestmark = pytest.mark.usefixtures("each_codec")

WHOLE_BYTES = [dtype for dtype, bits in DTYPE_BITS.items() if bits in (8, 16, 32, 64)]


def sparse_data(dtype, shape, kept, seed=0):
    """Random bytes; an element is all zero or all random."""
    random = np.random.default_rng(seed)
    data = random.integers(1, 256, (math.prod(shape), DTYPE_BITS[dtype] // 8), dtype=np.uint8)
    data[random.random(len(data)) >= kept] = 0
    return data.ravel()


def stored(data, dtype, shape):
    return np.concatenate(compress_tensor(data, dtype, shape))


@pytest.mark.parametrize("dtype", WHOLE_BYTES)
@pytest.mark.parametrize("kept", [0.01, 0.5])
def test_every_dtype_comes_back_bit_for_bit(dtype, kept):
    data = sparse_data(dtype, (3, 5, 70), kept)
    back, form = expand_tensor(stored(data, dtype, (3, 5, 70)))
    assert back.tobytes() == data.tobytes()
    assert (form.dtype, form.shape) == (dtype, (3, 5, 70))


@settings(max_examples=60)
@given(
    st.sampled_from(["F32", "BF16", "F8_E4M3", "I8", "F64"]),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.9, 1.0]),
)
def test_what_is_compressed_comes_back_and_is_smaller(dtype, shape, kept):
    data = sparse_data(dtype, shape, kept)
    parts = compress_tensor(data, dtype, shape)
    if parts is not None:
        back, form = expand_tensor(np.concatenate(parts))
        assert back.tobytes() == data.tobytes()
        assert form.shape == shape
        assert form.length < len(data)


@pytest.mark.parametrize(
    ("dtype", "kept", "form"),
    [
        ("F32", 0.5, "bitmask"), ("F32", 0.15, "bitmask"), ("F32", 0.1, "elias_fano"), ("BF16", 0.2, "bitmask"),
        ("BF16", 0.15, "elias_fano"), ("BF16", 0.05, "elias_fano"),
    ],
)  # fmt: skip
def test_a_bitmask_unless_another_form_is_clearly_smaller(dtype, kept, form):
    assert expand_tensor(stored(sparse_data(dtype, (64, 999), kept), dtype, (64, 999)))[1].form == form


def test_two_of_four_in_bf16_is_packed_and_in_fp32_hardly_smaller():
    mask = np.tile([1, 0, 1, 0, 0, 1, 1, 0], 5000).astype(bool)
    for dtype, form in (("BF16", "n_of_4"), ("F32", "bitmask")):
        width = DTYPE_BITS[dtype] // 8
        data = np.where(mask[:, None], 3, 0).astype(np.uint8).repeat(width, 1).ravel()
        back, found = expand_tensor(stored(data, dtype, (100, 400)))
        assert found.form == form
        assert back.tobytes() == data.tobytes()


def test_a_tensor_that_hardly_gets_smaller_stays_dense():
    assert compress_tensor(sparse_data("F32", (1000,), 0.93), "F32", (1000,)) is None
    assert compress_tensor(np.zeros(0, np.uint8), "F32", (0, 4)) is None
    assert compress_tensor(np.zeros(80, np.uint8), "BF16", (5, 8)) is None  # 73 bytes, but 80 with padding
    assert compress_tensor(np.zeros(32, np.uint8), "F4", (64,)) is None


@pytest.mark.parametrize(
    ("looked_at", "rest", "form"),
    [(1, 0, "elias_fano"), (0, 0.5, "bitmask"), (0, 1, None), (0.5, 0, "elias_fano"), (0.95, 0.99, None)],
)
def test_what_is_guessed_from_the_beginnings_is_set_right(looked_at, rest, form):
    data = np.concatenate([sparse_data("BF16", (4096,), looked_at), sparse_data("BF16", (61440,), rest)] * 5)
    parts = compress_tensor(data, "BF16", (5, 65536))
    assert (parts is None) == (form is None)
    if parts is not None:
        back, found = expand_tensor(np.concatenate(parts))
        assert found.form == form
        assert back.tobytes() == data.tobytes()


def test_bytes_in_a_row_are_always_stored_so_that_none_is_taken_for_ours():
    data = np.frombuffer(MAGIC * 9, np.uint8)
    back, form = expand_tensor(stored(data, "U8", (72,)))
    assert form.form == "plain"
    assert back.tobytes() == MAGIC * 9


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.95])
def test_the_size_is_that_of_the_values_and_at_most_a_bit_per_weight(sparsity):
    count = 1 << 17
    length = len(stored(sparse_data("F32", (count,), 1 - sparsity), "F32", (count,)))
    assert length <= 1.02 * (4 * (1 - sparsity) * count + count / 8)


def test_at_90_and_95_percent_the_size_is_within_6_percent_of_the_entropy_bound():
    count = 1 << 17
    for dtype, kept in (("F32", 0.1), ("F32", 0.05), ("BF16", 0.1), ("BF16", 0.05)):
        data = sparse_data(dtype, (count,), kept)
        kept = read_form(stored(data, dtype, (count,))[:128].tobytes(), len(stored(data, dtype, (count,)))).nonzeros
        share = kept / count
        bits = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * count
        assert len(stored(data, dtype, (count,))) <= 1.06 * (kept * DTYPE_BITS[dtype] + bits) / 8


VALID = stored(sparse_data("BF16", (8, 96), 0.4), "BF16", (8, 96))
COUNT = read_form(VALID[:128].tobytes(), len(VALID)).nonzeros


def head(magic=MAGIC, form=b"bitmask", dtype=b"BF16", dimensions=2, count=COUNT, shape=(8, 96)):
    return HEAD.pack(magic, form, dtype, dimensions, count) + struct.pack(f"<{len(shape)}Q", *shape)


def refused(content, most_elements=None):
    with pytest.raises(ValueError, match="A stored tensor is not usable") as caught:
        expand_tensor(np.frombuffer(bytes(content), np.uint8), most_elements)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_the_head_of_these_tests_is_the_real_one():
    assert VALID.tobytes().startswith(head())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"magic": b"sparsehg"}, "begins with"),
        ({"form": b"zip"}, "its form must be one of"),
        ({"form": b"\xff" * 16}, "its form must be one of"),
        ({"form": b"plain"}, "plain must be"),
        ({"form": b"elias_fano"}, "cannot take"),
        ({"form": b"n_of_4"}, "not N of every 4"),
        ({"dtype": b"F4"}, "its dtype"),
        ({"dtype": b"F32"}, "cannot take"),
        ({"dimensions": 17}, "cannot have 17 dimensions"),
        ({"dimensions": 2**64 - 1}, "dimensions"),
        ({"count": COUNT + 1}, "cannot take|marks"),
        ({"count": COUNT - 4}, "cannot take|marks"),
        ({"count": 2**64 - 1}, "cannot keep"),
        ({"shape": (2**63, 2)}, "larger than any"),
        ({"shape": (2**40, 2**40)}, "larger than any"),
        ({"shape": (2**32, 2**32)}, "larger than any"),
        ({"shape": (8, 97)}, "cannot take|spare|marks"),
        ({"shape": (0, 0)}, "cannot keep"),
    ],
    ids=str,
)
def test_a_head_that_lies(changes, problem):
    content = bytearray(VALID.tobytes())
    content[: len(head())] = head(**changes)
    assert any(text in refused(content) for text in problem.split("|"))


def test_truncated_at_every_length():
    for length in range(len(VALID)):
        assert "truncated" in refused(VALID[:length].tobytes())


def test_padding_must_be_zero():
    data = sparse_data("I8", (19, 17), 0.3)
    content = bytearray(stored(data, "I8", (19, 17)).tobytes())
    form = read_form(bytes(content), len(content))
    content[HEAD.size + 16 + form.nonzeros] = 1
    assert "padding" in refused(content)


def test_a_small_file_cannot_claim_to_be_huge():
    # All zeros have the shortest code: a bit per 32 elements, 1/1024 of the tensor in fp32.
    size = 2**40
    content = head(form=b"elias_fano", dtype=b"F32", dimensions=1, count=0, shape=(size,)) + bytes(2**20)
    assert "cannot take" in refused(content)


def test_a_tensor_larger_than_any_of_the_model():
    assert "larger than any" in refused(VALID.tobytes(), most_elements=8 * 96 - 1)
    assert expand_tensor(VALID, 8 * 96)[1].shape == (8, 96)


@settings(max_examples=60)
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
        assert len(data) == form.dense_bytes
