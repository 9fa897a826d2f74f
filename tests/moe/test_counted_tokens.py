"""Padding is what a mask of (batch, length) says, and nothing else is guessed from."""

import pytest
import torch

from sparse_hf.moe.counted_tokens import counted_tokens


def test_zeros_are_padding():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert counted_tokens(mask, 6).tolist() == [True, True, False, False, True, True]
    assert torch.equal(counted_tokens(mask.bool(), 6), counted_tokens(mask, 6))


def test_without_a_mask_all_count():
    assert counted_tokens(None, 4).tolist() == [True] * 4


@pytest.mark.parametrize("wrong", [torch.ones(2, 1, 8, 8), torch.ones(2, 7), torch.ones(16), "none"])
def test_another_mask_is_refused(wrong):
    with pytest.raises(ValueError, match="must tell padding of the 16 tokens as"):
        counted_tokens(wrong, 16)
