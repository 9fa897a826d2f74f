"""The numbers of a structured ticket, by hand."""

import pytest
import torch

from sparse_hf.tickets.origin import TicketOrigin
from sparse_hf.tickets.structured_ticket import StructuredTicket


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
