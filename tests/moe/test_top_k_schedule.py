"""What schedules of k refuse."""

import pytest

from sparse_hf import TopKSchedule


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_of_experts(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of experts, 1 or more, got"):
        TopKSchedule(**{name: value})


@pytest.mark.parametrize("until", [0, 1.1, float("nan"), "1", True])
def test_part_of_the_training(until):
    with pytest.raises(ValueError, match="`until` must be a part of the training"):
        TopKSchedule(until=until)


def test_shape():
    with pytest.raises(ValueError, match="Unknown shape 'steps'. Choose one of: linear, cosine, exponential."):
        TopKSchedule(shape="steps")


def test_the_default_is_smoe_dropout():
    assert TopKSchedule() == TopKSchedule(start=1, end=None, shape="linear", until=1.0, freeze_routers=True)
