import pytest
import torch

from sparse_hf.algorithms.mask_distance import hamming_distance, overlap


def masks(*rows):
    return [torch.tensor([bool(int(bit)) for bit in row]) for row in rows]


def test_hamming_distance_by_hand():
    # 2 of 6 weights differ, over all tensors together
    assert hamming_distance(masks("1100", "10"), masks("1010", "10")) == pytest.approx(2 / 6)


def test_hamming_distance_is_0_for_itself_1_for_the_complement_and_symmetric():
    a = masks("110010", "1")
    assert hamming_distance(a, a) == 0.0
    assert hamming_distance(a, [~mask for mask in a]) == 1.0
    b = masks("011011", "1")
    assert hamming_distance(a, b) == hamming_distance(b, a) == pytest.approx(3 / 7)


def test_overlap_by_hand():
    # common: 1 + 1, either: 3 + 1
    assert overlap(masks("1100", "10"), masks("1010", "10")) == pytest.approx(2 / 4)


def test_overlap_of_disjoint_same_and_empty_masks():
    assert overlap(masks("1100"), masks("0011")) == 0.0
    assert overlap(masks("1100"), masks("1100")) == 1.0
    assert overlap(masks("0000"), masks("0000")) == 1.0
    assert overlap([], []) == 1.0
    assert hamming_distance([], []) == 0.0


@pytest.mark.parametrize("measure", [hamming_distance, overlap])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (masks("10"), masks("10", "1"), "same number of masks, got 1 and 2"),
        (masks("1", "10"), masks("1", "101"), r"same shape, got \(2,\) and \(3,\) at position 1"),
        ([torch.ones(2)], [torch.ones(2)], "must be bool, got torch.float32"),
        ([torch.ones(2, dtype=torch.uint8)], masks("10"), "must be bool, got torch.uint8"),
    ],
)
def test_sets_that_do_not_match_are_refused(measure, a, b, message):
    with pytest.raises(ValueError, match=message):
        measure(a, b)
