import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.bits import pack_bits, unpack_bits


def test_the_first_weight_is_the_lowest_bit():
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    # flat: 10000001 10, so byte 0 has bits 0 and 7, byte 1 has bit 0
    assert pack_bits(mask).tolist() == [0b10000001, 0b00000001]
    assert torch.equal(unpack_bits(torch.tensor([0b10000001, 0b00000001], dtype=torch.uint8), (2, 5)), mask)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.randoms(use_true_random=False))
def test_round_trip_for_any_shape(shape, random):
    mask = torch.tensor([random.random() < 0.5 for _ in range(torch.Size(shape).numel())], dtype=torch.bool).view(
        shape
    )
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    restored = unpack_bits(packed, shape)
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


def test_a_transposed_mask_is_packed_in_its_own_order():
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_bits(mask.t()), pack_bits(mask.t().contiguous()))


def test_unpacked_masks_are_ordinary_bool_tensors():
    mask = unpack_bits(torch.tensor([255], dtype=torch.uint8), (2, 4))
    mask[0, 0] = False
    assert (~mask).sum() == 1
    assert torch.ones(2, 4)[mask].sum() == 7


def test_packing_refuses_what_is_not_bool():
    with pytest.raises(ValueError, match="`mask` must be a bool tensor, got torch.uint8"):
        pack_bits(torch.ones(8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("packed", "shape", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), (8,), r"must hold 1 bytes for a mask of shape \(8,\), got 2"),
        (torch.zeros(0, dtype=torch.uint8), (1,), r"must hold 1 bytes"),
        (torch.zeros(1, dtype=torch.int8), (8,), "must be a 1-D uint8 tensor, got 1-D torch.int8"),
        (torch.zeros(1, 1, dtype=torch.uint8), (8,), "must be a 1-D uint8 tensor, got 2-D torch.uint8"),
        (torch.tensor([0b1000], dtype=torch.uint8), (3,), "must have zero spare bits after the 3 weights"),
    ],
)
def test_unpacking_refuses(packed, shape, message):
    with pytest.raises(ValueError, match=message):
        unpack_bits(packed, shape)
