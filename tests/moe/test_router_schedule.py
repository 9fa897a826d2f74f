"""Which steps train routers, and what a schedule of them refuses."""

import pytest

from sparse_hf import RouterSchedule


def test_router_steps_by_hand():
    schedule = RouterSchedule(frozen_until=2, warm_up_steps=3, frozen_from=7)
    assert [schedule.frozen_at(step) for step in range(9)] == [True] * 2 + [False] * 5 + [True] * 2
    assert [schedule.rate_at(step) for step in range(2, 7)] == [0.25, 0.5, 0.75, 1, 1]
    throughout = RouterSchedule(frozen_from=0)
    assert throughout.frozen_at(0)
    assert throughout.frozen_at(99)


@pytest.mark.parametrize("name", ["frozen_until", "warm_up_steps", "frozen_from"])
@pytest.mark.parametrize("value", [-1, 0.5, True])
def test_steps(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of steps, 0 or more, got"):
        RouterSchedule(**{name: value})


def test_nothing_to_do():
    with pytest.raises(ValueError, match="must freeze or warm up, got neither"):
        RouterSchedule()
