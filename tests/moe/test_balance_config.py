"""What a balance config refuses."""

import pytest

from sparse_hf import BalanceConfig


@pytest.mark.parametrize("name", ["coefficient", "z"])
@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf"), "0.1", True])
def test_coefficients(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be 0 or more, got"):
        BalanceConfig(**{name: value})


def test_gradient():
    with pytest.raises(ValueError, match="Unknown gradient 'all'. Choose one of: routers, network."):
        BalanceConfig(gradient="all")


def test_zero_measures():
    assert BalanceConfig(0).coefficient == BalanceConfig().z == 0
