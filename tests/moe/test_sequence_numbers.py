"""Sequences are rows, or what `position_ids` make of packed ones."""

import pytest
import torch

from sparse_hf.moe.sequence_numbers import sequence_numbers


IDS = torch.ones(2, 4, dtype=torch.long)
CPU = torch.device("cpu")


def found(tokens=8, **inputs):
    numbers, count = sequence_numbers(inputs, tokens, CPU)
    return numbers.tolist(), count


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "inputs_embeds", "pixel_values"])
def test_rows(name):
    assert found(**{name: IDS}) == ([0, 0, 0, 0, 1, 1, 1, 1], 2)
    assert found(10, **{name: IDS}) == ([0] * 5 + [1] * 5, 2)  # a vision model has more tokens than pixels' rows tell


def test_packed_rows():
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert found(input_ids=IDS, position_ids=positions) == ([0, 0, 1, 1, 2, 2, 2, 2], 3)
    assert found(input_ids=IDS, position_ids=torch.arange(4)[None]) == ([0, 0, 0, 0, 1, 1, 1, 1], 2)
    flat = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1]])  # without padding, as for flash attention
    numbers = found(input_ids=IDS.view(1, 8), position_ids=flat, cu_seq_lens_q=torch.tensor([0, 3, 4, 6, 8]))
    assert numbers == ([0, 0, 0, 1, 2, 2, 3, 3], 4)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match=r"which of the 8 tokens are one sequence.*Set `sequence` to 0"):
        found(labels=IDS)
    with pytest.raises(ValueError, match="which of the 7 tokens"):
        found(7, input_ids=IDS)
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(ValueError, match=f"got `{name}` without.*return_position_ids=True"):
            found(input_ids=IDS, **{name: torch.tensor([0, 4])})
    for positions, told in ((torch.zeros(3, 2, 4), r"\[3, 2, 4\]"), (torch.zeros(2, 3), r"\[2, 3\]"), ("none", "str")):
        with pytest.raises(ValueError, match=f"`position_ids` must be .* got {told} for 2 rows of 4 tokens"):
            found(input_ids=IDS, position_ids=positions)
