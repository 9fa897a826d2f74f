import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.algorithms.elias_fano import code_bytes, compress_elias_fano, expand_elias_fano, low_bits
from sparse_hf.algorithms.n_of_4_codec import compress_n_of_4, expand_n_of_4, kept_of_4, obeys_n_of_4
from sparse_hf.algorithms.nonzeros import BLOCK, compress_bitmask, expand_bitmask, marked_positions


pytestmark = pytest.mark.usefixtures("each_codec")

WIDTHS = ["u1", "<u2", "<u4", "<u8"]


def sparse_elements(size, kept, width="<u2", seed=0):
    random = np.random.default_rng(seed)
    elements = random.integers(1, 200, size).astype(width)
    elements[random.random(size) >= kept] = 0
    return elements


def back(compress, expand, elements):
    values, code = compress(elements, np.count_nonzero(elements))
    out = np.full(len(elements), 7, elements.dtype)
    expand(np.concatenate([elements[:0], *values]), code, out)
    return out


def test_bitmask_by_hand():
    values, bits = compress_bitmask(np.array([5, 0, 0, 7, 0, 0, 0, 0, 9], "<u4"), 3)
    assert np.concatenate(values).tolist() == [5, 7, 9]
    assert bits.tolist() == [0b00001001, 0b1]


def test_elias_fano_by_hand():
    # Indices 3, 8, 9 of 16: two low bits make 6 + 4 the shortest; low parts 3, 0, 1; high parts 0, 2, 2, so that bits
    # 0 + 0, 2 + 1 and 2 + 2 of the bitmap are set.
    elements = np.zeros(16, np.uint8)
    elements[[3, 8, 9]] = 4, 5, 6
    values, code = compress_elias_fano(elements, 3)
    assert low_bits(16, 3) == 2
    assert np.concatenate(values).tolist() == [4, 5, 6]
    assert code.tolist() == [0b101, 0b001, 0b011001]


def test_the_default_device_does_not_matter():
    elements = np.zeros(100, "u2")
    elements[::25] = 7
    with torch.device("meta"):
        values, code = compress_elias_fano(elements, 4)
        expand_elias_fano(np.concatenate(values), code, out := np.empty_like(elements))
    assert (out == elements).all()


def test_two_of_four_by_hand():
    # The patterns are 3, 5, 6, 9, 10, 12: the first group has the first, the second the fifth.
    values, code = compress_n_of_4(np.array([1, 2, 0, 0, 0, 3, 0, 4], np.uint8), 4)
    assert np.concatenate(values).tolist() == [1, 2, 3, 4]
    assert code.tolist() == [0 + 6 * 4]


def test_zero_is_an_element_without_a_set_bit():
    floats = np.array([0.0, -0.0, np.nan, 1e-45], "<f4")
    assert len(np.concatenate(compress_bitmask(floats.view("<u4"), 3)[0])) == 3
    assert back(compress_bitmask, expand_bitmask, floats.view("<u4")).tobytes() == floats.tobytes()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kept", [0, 0.02, 0.1, 0.2, 0.5, 1])
def test_round_trips_over_several_blocks(width, kept):
    elements = sparse_elements(2 * BLOCK + 13, kept, width)
    for compress, expand in ((compress_bitmask, expand_bitmask), (compress_elias_fano, expand_elias_fano)):
        assert (back(compress, expand, elements) == elements).all()


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0, 0, 0, 1, 255]), max_size=100), st.sampled_from(WIDTHS))
def test_round_trips(content, width):
    elements = np.array(content, width)
    for compress, expand in ((compress_bitmask, expand_bitmask), (compress_elias_fano, expand_elias_fano)):
        assert back(compress, expand, elements).tolist() == content


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, BLOCK // 4 + 1])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_round_trips_of_n_of_4(kept, groups):
    order = np.random.default_rng(groups).random((groups, 4)).argsort(1)
    elements = np.where(order < kept, 9, 0).astype("<u2").ravel()
    assert obeys_n_of_4(elements, kept * groups)
    assert (back(compress_n_of_4, expand_n_of_4, elements) == elements).all()


@pytest.mark.parametrize(
    "content", [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0] * 9 + [1, 1, 1, 0] + [1, 0, 0, 0], [1, 1, 0]]
)
def test_a_group_that_holds_more_than_another_is_not_n_of_4(content):
    assert not obeys_n_of_4(np.array(content, np.uint8), sum(content))


@pytest.mark.parametrize(("size", "count", "kept"), [(8, 4, 2), (8, 2, 1), (8, 3, None), (8, 8, None), (0, 0, None)])
def test_which_n_a_count_means(size, count, kept):
    assert kept_of_4(size, count) == kept


@settings(max_examples=40)
@given(st.integers(1, 1 << 20), st.data())
def test_the_number_of_low_bits_makes_the_code_shortest(size, data):
    count = data.draw(st.integers(0, size))
    chosen = low_bits(size, count)
    assert all(chosen * count + (size >> chosen) <= other * count + (size >> other) for other in range(6))


@pytest.mark.parametrize("kept", [0.05, 0.1])
def test_elias_fano_is_within_12_percent_of_the_entropy_of_the_mask(kept):
    size = 1 << 20
    entropy = -(kept * np.log2(kept) + (1 - kept) * np.log2(1 - kept)) * size / 8
    assert code_bytes(size, int(kept * size)) <= 1.12 * entropy


@settings(max_examples=40)
@given(st.lists(st.booleans(), max_size=100), st.integers(0, 30), st.booleans())
def test_marked_positions(flags, spread, few):
    flags = np.array([False] * (8 * spread) + flags, bool)
    assert marked_positions(flags, few).tolist() == [place for place, flag in enumerate(flags) if flag]


@pytest.mark.parametrize("kept", [0, 0.05, 0.1, 0.5, 1])
@pytest.mark.parametrize("guess", [0, 0.1, 1])
def test_a_wrong_guess_of_the_count_changes_nothing(kept, guess):
    elements = sparse_elements(BLOCK + 1000, kept)
    for compress in (compress_bitmask, compress_elias_fano):
        values, code = compress(elements, int(guess * len(elements)))
        right, right_code = compress(elements, np.count_nonzero(elements))
        assert np.concatenate(values).tolist() == np.concatenate(right).tolist() == elements[elements != 0].tolist()
        assert code.tolist() == right_code.tolist()


@pytest.mark.parametrize(
    ("bits", "problem"),
    [([0b101, 0], "2 of the 3"), ([0b1111, 0], "more than the 3"), ([0b111, 0b100], "spare"), ([0b111, 1], "more")],
)
def test_a_bitmask_that_disagrees_with_its_values(bits, problem):
    with pytest.raises(ValueError, match=problem):
        expand_bitmask(np.ones(3, "u1"), np.array(bits, np.uint8), np.zeros(10, "u1"))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ([0b101, 0b001, 0b001001], "2 indices for 3 values"),
        ([0b101, 0b001, 0b111001], "more indices than the 3"),
        ([0b101, 0b001, 0b1011001], "a spare bit"),
        ([0b1101, 0b001, 0b011001], "a spare bit"),
        ([0b001, 0b001, 0b011001], "do not rise"),  # 8 and 8
        ([0b011, 0b001, 0b011001], "do not rise"),  # 9 and 8
    ],
)
def test_a_code_that_no_indices_have(code, problem):
    with pytest.raises(ValueError, match=problem):
        expand_elias_fano(np.ones(3, "u1"), np.array(code, np.uint8), np.zeros(16, "u1"))


def test_an_index_beyond_the_end():
    # 14 elements leave the last high part, 3, room for low parts 0 and 1.
    with pytest.raises(ValueError, match="not below 14"):
        expand_elias_fano(np.ones(3, "u1"), np.array([0b111, 0b111, 0b111000], np.uint8), np.zeros(14, "u1"))


@pytest.mark.parametrize(("code", "problem"), [([216], "above 215"), ([36], "spare digit"), ([255], "above")])
def test_a_byte_that_stands_for_no_patterns(code, problem):
    with pytest.raises(ValueError, match=problem):
        expand_n_of_4(np.ones(4, "u1"), np.array(code, np.uint8), np.zeros(8, "u1"))
