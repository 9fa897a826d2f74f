"""Pruned positions become +0.0 whatever was there; every other bit stays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.masking import INTEGER_VIEW, sign_extended, zero_pruned_


DTYPES = list(INTEGER_VIEW)


def bit_pattern(tensor):
    return tensor.contiguous().view(INTEGER_VIEW[tensor.dtype])


def test_sign_extended_by_hand():
    bits = sign_extended(torch.tensor([[True, False], [False, True]]))
    assert bits.dtype == torch.int8
    assert bits.tolist() == [[-1, 0], [0, -1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    values = [1.5, -2.0, math.nan, math.inf, -math.inf, -0.0, 0.0, -1e-7]
    kept = torch.tensor(values, dtype=dtype)
    pruned = kept.clone()
    zero_pruned_(pruned, sign_extended(torch.zeros(8, dtype=torch.bool)))
    assert bit_pattern(pruned).tolist() == [0] * 8  # +0.0, not -0.0
    before = bit_pattern(kept).clone()
    zero_pruned_(kept, sign_extended(torch.ones(8, dtype=torch.bool)))
    assert torch.equal(bit_pattern(kept), before)


@given(
    st.lists(st.integers(0, 7), max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.booleans(),
)
def test_equals_where(shape, dtype, seed, transpose):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.5
    if transpose:
        tensor, mask = tensor.mT if len(shape) > 1 else tensor, mask.mT if len(shape) > 1 else mask
    expected = torch.where(mask, tensor, torch.zeros((), dtype=dtype))
    result = zero_pruned_(tensor, sign_extended(mask))
    assert result is tensor
    assert torch.equal(bit_pattern(tensor), bit_pattern(expected))


@pytest.mark.parametrize("numel", [1, 8191, 8192, 8193, 70_001])
def test_every_block_is_masked(numel):
    tensor = torch.ones(numel)
    mask = torch.arange(numel) % 3 == 0
    zero_pruned_(tensor, sign_extended(mask))
    assert torch.equal(tensor != 0, mask)


def test_a_slice_is_masked_in_place_and_its_neighbours_stay():
    whole = torch.ones(4, 6)
    zero_pruned_(whole[:, 1:3], sign_extended(torch.zeros(4, 2, dtype=torch.bool)))
    assert whole.sum(0).tolist() == [4, 0, 0, 4, 4, 4]


def test_mask_of_other_strides():
    tensor = torch.ones(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    zero_pruned_(tensor, sign_extended(mask.T))
    assert torch.equal(tensor != 0, mask.T)


def test_parameter_that_requires_gradients():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    version = parameter._version
    zero_pruned_(parameter, sign_extended(torch.eye(2, dtype=torch.bool)))
    assert parameter.tolist() == [[1, 0], [0, 1]]
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter._version > version  # autograd notices that a saved tensor was changed


@pytest.mark.parametrize(
    ("tensor", "bits", "reason"),
    [
        (torch.ones(2, 3), torch.zeros(3, 2, dtype=torch.int8), r"shape of its tensor, got \(3, 2\) for \(2, 3\)"),
        (torch.ones(6), torch.zeros(2, 3, dtype=torch.int8), "shape of its tensor"),
        (torch.ones(2), torch.ones(2, dtype=torch.bool), "`bits` must be int8, got torch.bool"),
        (
            torch.ones(2, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int8),
            "got torch.int32. Choose one of: torch.f",
        ),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2, dtype=torch.int8), "Only floating-point weights"),
    ],
    ids=["transposed", "flat", "bool bits", "integers", "float8"],
)
def test_what_does_not_fit_is_refused_and_unchanged(tensor, bits, reason):
    with pytest.raises(ValueError, match=reason):
        zero_pruned_(tensor, bits)
    assert (tensor.float() == 1).all()
