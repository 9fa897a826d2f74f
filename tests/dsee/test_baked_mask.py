"""S1 in a weight comes back, also where others cast or split the weight."""

import torch
from torch import nn

from sparse_hf.dsee.baked_mask import BakedMask
from sparse_hf.dsee.weight_parts import WeightRun


def baked():
    weight = nn.Parameter(torch.arange(1.0, 13).view(3, 4), requires_grad=False)
    mask = torch.arange(12).view(3, 4) % 3 != 0  # 1, 4, 7 and 10 are removed
    mine = BakedMask()
    mine.bake_(weight, mask)
    return weight, mask, mine


def test_a_weight_that_was_cast_alone():
    weight, mask, mine = baked()
    assert torch.equal(weight == 0, ~mask)
    weight.data = weight.data.bfloat16()  # as DeepSpeed does
    mine.restore_(weight)
    assert torch.equal(weight, torch.arange(1, 13).view(3, 4).bfloat16())


def test_each_rank_keeps_what_was_removed_from_its_part():
    for start, length, kept_values in ((0, 5, [1.0, 4.0]), (5, 4, [7.0]), (9, 3, [10.0]), (10, 2, []), (12, 0, [])):
        weight, _, mine = baked()
        run = WeightRun(start, weight.flatten()[start : start + length].clone())
        mine.keep_part(run, (3, 4))
        assert mine.removed.tolist() == kept_values
        assert mine.is_part
        mine._put_back(run, (3, 4))
        assert torch.equal(run.weights, torch.arange(1.0, 13)[start : start + length])
