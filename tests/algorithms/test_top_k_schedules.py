"""The number of experts per token over steps, by hand."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.top_k_schedules import Shape, scheduled_top_k


def curve(shape, start=1, end=8, steps=7):
    return [scheduled_top_k(step, steps, start, end, shape) for step in range(steps + 1)]


def test_linear_by_hand():
    assert curve("linear") == [1, 2, 3, 4, 5, 6, 7, 8]
    # SMoE-Dropout's own range: k(t) = round(8 t / T) + 8; halves go up.
    assert curve("linear", 8, 16, 16) == [8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16]


def test_cosine_is_slow_at_both_ends():
    # 1 + 3.5 (1 - cos(pi t / 7)): 1, 1.35, 2.32, 3.72, 5.28, 6.68, 7.65, 8
    assert curve("cosine") == [1, 1, 2, 4, 5, 7, 8, 8]


def test_exponential_multiplies():
    assert curve("exponential", 1, 8, 3) == [1, 2, 4, 8]
    assert curve("exponential", 1, 8, 6) == [1, 1, 2, 3, 4, 6, 8]  # sqrt(2)^t: 1.41, 2, 2.83, 4, 5.66


@given(
    st.sampled_from(get_args(Shape)), st.integers(1, 70), st.integers(1, 70), st.integers(1, 50), st.integers(0, 80)
)
def test_it_goes_from_start_to_end_and_never_back(shape, start, end, steps, step):
    now, later = (scheduled_top_k(one, steps, start, end, shape) for one in (step, step + 1))
    assert min(start, end) <= now <= max(start, end)
    assert (later - now) * (end - start) >= 0
    assert scheduled_top_k(0, steps, start, end, shape) == start
    assert scheduled_top_k(steps + step, steps, start, end, shape) == end


@pytest.mark.parametrize(("name", "value"), [("step", -1), ("steps", 0), ("start", 0), ("end", 0)])
def test_refused_numbers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        scheduled_top_k(**{**dict(step=0, steps=1, start=1, end=2, shape="linear"), name: value})


def test_unknown_shape():
    with pytest.raises(ValueError, match="Unknown shape 'steps'. Choose one of: linear, cosine, exponential."):
        scheduled_top_k(0, 1, 1, 2, "steps")
    assert math.isclose(1.0, scheduled_top_k(0, 1, 1, 2, "linear"))
