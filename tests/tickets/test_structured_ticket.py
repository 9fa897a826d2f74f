"""The numbers of a structured ticket, by hand."""

import pytest
import torch

from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.origin import TicketOrigin
from sparse_hf.tickets.structured_ticket import StructuredTicket
from tiny_models import tiny_model
from tiny_slim import OPT_TABLE


ORIGIN = TicketOrigin(method="early_bird")
HEADS, NEURONS = "encoder.layer.{}.heads", "encoder.layer.{}.neurons"


def bools(text):
    return torch.tensor([digit == "1" for digit in text], dtype=torch.bool)


def ticket(first="1100"):
    """Two layers of 4 heads and 10 neurons: 3 of 8 heads and 12 of 20 neurons stay."""
    masks = {HEADS.format(0): first, NEURONS.format(0): "1111111000"}
    masks |= {HEADS.format(1): "0010", NEURONS.format(1): "1111100000"}
    return StructuredTicket({key: bools(mask) for key, mask in masks.items()}, ORIGIN)


def test_counts_and_fractions():
    first, second = ("encoder.layer.0.heads", 2), ("encoder.layer.0.neurons", 7)
    third, fourth = ("encoder.layer.1.heads", 1), ("encoder.layer.1.neurons", 5)
    assert list(ticket().counts().items()) == [first, second, third, fourth]
    assert (ticket().kept_fraction("heads"), ticket().kept_fraction("neurons")) == (3 / 8, 12 / 20)


def test_a_fraction_of_units_it_lacks_lists_those_it_has():
    only_heads = StructuredTicket({HEADS.format(0): bools("10")})
    with pytest.raises(ValueError, match="`kind` must be one of 'heads' in this ticket, got 'neurons'"):
        only_heads.kept_fraction("neurons")


def test_distance_is_that_of_the_kind_that_differs_most():
    other = ticket("0110")  # 2 of 8 heads differ, no neuron
    assert ticket().distance(other) == other.distance(ticket()) == 2 / 8
    other.units[NEURONS.format(1)] = bools("0000011111")  # and 10 of 20 neurons
    assert ticket().distance(other) == 10 / 20
    assert ticket().distance(ticket()) == 0


def test_distance_does_not_depend_on_the_order_of_units():
    turned = StructuredTicket(dict(reversed(ticket("0110").units.items())))
    assert ticket().distance(turned) == 2 / 8


@pytest.mark.parametrize(
    ("units", "told"),
    [
        ({HEADS.format(0): bools("1100")}, "`encoder.layer.0.neurons` has 10 here and 0 there"),
        ({**ticket().units, HEADS.format(1): bools("11111")}, "`encoder.layer.1.heads` has 4 here and 5 there"),
        ({**ticket().units, HEADS.format(2): bools("11")}, "`encoder.layer.2.heads` has 0 here and 2 there"),
    ],
)
def test_other_units_cannot_be_compared(units, told):
    with pytest.raises(ValueError, match=f"Only structured tickets of the same units can be compared, {told}"):
        ticket().distance(StructuredTicket(units))


def test_repr():
    told = "StructuredTicket(heads 3/8 kept, neurons 12/20 kept, 2 layers, early_bird)"
    assert repr(ticket()) == told
    one_layer = StructuredTicket({HEADS.format(0): bools("101")})
    assert repr(one_layer) == "StructuredTicket(heads 2/3 kept, 1 layer, method not recorded)"


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ({}, "it has no masks"),
        ({"heads": bools("1")}, "'heads' must be a layer's path and then `.heads` or `.neurons`"),
        ({"layer.0.weight": bools("1")}, "'layer.0.weight' must be a layer's path"),
        ({"a.heads": torch.ones(2)}, "the mask of `a.heads` is 1-D torch.float32"),
        ({"a.heads": torch.ones(2, 2, dtype=torch.bool)}, "the mask of `a.heads` is 2-D torch.bool"),
        ({"a.heads": bools("1"), "a.neurons": bools("000")}, "the mask of `a.neurons` keeps none of 3"),
        ({"a.heads": bools("")}, "the mask of `a.heads` keeps none of 0"),
    ],
)
def test_what_is_no_structured_ticket_is_refused(units, problem):
    with pytest.raises(
        ValueError, match=f"needs a 1-D bool mask that keeps at least one unit for each key: {problem}"
    ):
        StructuredTicket(units)


def test_masks_changed_afterwards_do_not_change_the_ticket():
    mask = bools("11")
    made = StructuredTicket({"a.heads": mask})
    mask.fill_(False)
    assert made.counts() == {"a.heads": 2}


def test_from_model_keeps_the_units_of_the_largest_weights():
    model = tiny_model("bert")
    with torch.no_grad():  # head 2 of 4 and the last 16 of 64 neurons of the first layer are to go
        layer = model.encoder.layer[0]
        layer.attention.self.query.weight[16:24] = 0
        layer.intermediate.dense.weight[48:] = 0
        layer.output.dense.weight[:, 48:] = 0
    config = EarlyBirdConfig(heads=0.25, neurons=0.125)
    drawn = StructuredTicket.from_model(model, config)
    assert drawn.units[HEADS.format(0)].tolist() == [True, True, False, True]
    assert drawn.units[NEURONS.format(0)].tolist() == 48 * [True] + 16 * [False]
    assert drawn.counts() == {HEADS.format(0): 3, NEURONS.format(0): 48, HEADS.format(1): 3, NEURONS.format(1): 64}
    assert (drawn.origin.method, drawn.origin.model_type) == ("magnitude_units", "bert")
    assert drawn.origin.model_parameters == model.num_parameters()
    assert drawn.distance(StructuredTicket.from_model(model, config, seed=5)) == 0  # magnitudes know no seed


def test_from_model_at_random_follows_the_seed():
    model, state = tiny_model("bert"), torch.get_rng_state()
    config = EarlyBirdConfig(heads=0.5, neurons=0.5)
    first, again, other = (StructuredTicket.from_model(model, config, "random", seed) for seed in (0, 0, 1))
    assert first.distance(again) == 0 < first.distance(other)
    assert first.origin.method == "random_units"
    assert (first.kept_fraction("heads"), first.kept_fraction("neurons")) == (0.5, 0.5)
    assert first.distance(StructuredTicket.from_model(model, config)) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_from_model_without_config_takes_the_default_budgets():
    drawn = StructuredTicket.from_model(tiny_model("bert"))
    assert drawn.counts()[HEADS.format(0)] == 3  # of 4, a third less
    assert drawn.kept_fraction("neurons") == 80 / 128  # of 76.8, the nearest multiple of 16


def test_from_model_takes_the_table_of_a_family_outside():
    drawn = StructuredTicket.from_model(tiny_model("opt"), EarlyBirdConfig(unit_table=OPT_TABLE))
    assert list(drawn.counts())[0] == "decoder.layers.0.heads"


def test_from_model_refuses():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="Unknown score 'gradient'. Choose one of: magnitude, random"):
        StructuredTicket.from_model(model, score="gradient")
    with pytest.raises(ValueError, match="got a `target_speedup`: that takes a search"):
        StructuredTicket.from_model(model, EarlyBirdConfig(target_speedup=2.0))
    with pytest.raises(ValueError, match="would empty a layer"):
        StructuredTicket.from_model(model, EarlyBirdConfig(heads=0.9))
    with pytest.raises(ValueError, match="Heads and neurons are known for"):
        StructuredTicket.from_model(tiny_model("opt"))


def test_shuffled_keeps_the_counts():
    origin = TicketOrigin(method="early_bird", model_type="bert", config={"heads": 0.5}, metrics={"drawn_at": 3})
    units = {"a.heads": bools("110000000000"), "a.neurons": torch.arange(64) < 16, "b.neurons": torch.arange(64) < 48}
    drawn = StructuredTicket(units, origin)
    first, again, other = drawn.shuffled(0), drawn.shuffled(0), drawn.shuffled(1)
    assert first.counts() == other.counts() == drawn.counts() == {"a.heads": 2, "a.neurons": 16, "b.neurons": 48}
    assert first.distance(again) == 0
    assert all(first.distance(one) > 0.1 for one in (other, drawn))
    assert torch.equal(drawn.units["a.neurons"], units["a.neurons"])
    assert (first.origin.method, first.origin.model_type) == ("random_units", "bert")
    assert first.origin.config == first.origin.metrics == {}
