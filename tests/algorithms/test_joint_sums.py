"""Computations share their sums, and each gets what it would have got alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.joint_sums import added_up, alone, each_added_up, summed, together


def doubling(length, rounds, log=None):
    """Asks `rounds` times for the sums of `length` counts, beginning with ones."""
    counts = np.ones(length, dtype=np.int64)
    for _ in range(rounds):
        counts = yield counts
        if log is not None:
            log.append(length)
    return counts.tolist()


def failing(after):
    for _ in range(after):
        yield np.ones(1, dtype=np.int64)
    raise ValueError(f"after {after}")


class TwoAlike:
    """The sum over two ranks that hold the same."""

    def __init__(self):
        self.sizes = []

    def __call__(self, counts):
        self.sizes.append(counts.numel())
        return 2 * counts


def test_what_many_want_goes_into_one_sum():
    add = TwoAlike()
    results = each_added_up([doubling(3, 1), doubling(2, 4), doubling(5, 0), doubling(1, 2)], add)
    assert results == [[2] * 3, [16] * 2, [1] * 5, [4]]
    assert add.sizes == [6, 3, 2, 2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6))
def test_results_are_those_of_each_alone(shapes):
    one_by_one = [added_up(doubling(*shape), TwoAlike()) for shape in shapes]
    add = TwoAlike()
    assert each_added_up([doubling(*shape) for shape in shapes], add) == one_by_one
    assert len(add.sizes) == max((rounds for _, rounds in shapes), default=0)


def test_a_computation_may_share_its_own_sums():
    def nested():
        [first] = yield from summed(7)
        pair = yield from together([doubling(2, 1), doubling(1, 2)])
        return first, pair

    add = TwoAlike()
    assert each_added_up([nested(), doubling(1, 1)], add) == [(14, [[2, 2], [4]]), [2]]
    assert add.sizes == [2, 3, 1]


def test_without_other_ranks_one_is_finished_before_the_next_begins():
    log = []
    assert each_added_up([doubling(2, 2, log), doubling(3, 2, log)], alone) == [[1, 1], [1, 1, 1]]
    assert log == [2, 2, 3, 3]
    log.clear()
    each_added_up([doubling(2, 2, log), doubling(3, 2, log)], lambda counts: counts)
    assert log == [2, 3, 2, 3]


@pytest.mark.parametrize("delays", [(3, 1), (1, 3), (2, 2), (0, 0)])
@pytest.mark.parametrize("add", [alone, TwoAlike()])
def test_the_first_in_order_tells_what_is_wrong(add, delays):
    """As it would have, had they run one after the other: not the one that fails in the earliest sum."""
    add_up = [doubling(1, 5), failing(delays[0]), doubling(1, 2), failing(delays[1])]
    with pytest.raises(ValueError, match=f"after {delays[0]}$"):
        each_added_up(add_up, add)
