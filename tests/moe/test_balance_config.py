"""What a balance config refuses."""

import pytest

from sparse_hf import BalanceConfig


@pytest.mark.parametrize("name", ["coefficient", "z", "sequence", "device", "bias_rate"])
@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf"), "0.1", True])
def test_coefficients(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be 0 or more, got"):
        BalanceConfig(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), "0.1", False])
def test_entropy_has_either_sign(value):
    with pytest.raises(ValueError, match="`entropy` must be a finite number, got"):
        BalanceConfig(entropy=value)
    assert BalanceConfig(0, entropy=-0.1).has_losses


@pytest.mark.parametrize(("device", "groups"), [(0.1, 1), (0.1, 0), (0.1, 2.0), (0.0, 2), (0.1, True)])
def test_device_groups(device, groups):
    with pytest.raises(ValueError, match="`device_groups` must be a whole number, 2 or more with `device`"):
        BalanceConfig(device=device, device_groups=groups)


def test_float32_routers():
    with pytest.raises(ValueError, match="`float32_routers` must be True or False, got 1"):
        BalanceConfig(float32_routers=1)


def test_gradient():
    with pytest.raises(ValueError, match="Unknown gradient 'all'. Choose one of: routers, network."):
        BalanceConfig(gradient="all")


def test_zero_measures():
    assert BalanceConfig(0).coefficient == BalanceConfig().z == 0
    assert not BalanceConfig(0, bias_rate=0.001, float32_routers=True).has_losses
