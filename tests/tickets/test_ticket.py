"""The numbers of a ticket, by hand."""

import pytest
import torch

from sparse_hf.anatomy import find_sites, named_canonical_parameters
from sparse_hf.tickets.origin import TicketOrigin
from sparse_hf.tickets.prune import prune
from sparse_hf.tickets.ticket import Ticket
from tiny_models import tiny_model


A = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool)  # 3 of 6 kept
B = torch.tensor([[[1, 1], [1, 1]], [[0, 0], [0, 1]]], dtype=torch.bool)  # two experts: 4 of 4 and 1 of 4


def ticket(**changes):
    return Ticket.from_masks({"a.weight": A, "experts.up": B, **changes})


def test_masks_come_back():
    masks = ticket().masks()
    assert list(masks) == ["a.weight", "experts.up"]
    assert torch.equal(masks["a.weight"], A)
    assert torch.equal(masks["experts.up"], B)
    assert masks["a.weight"].dtype == torch.bool


def test_counts():
    assert ticket().num_weights == 14
    assert ticket().num_kept == 8
    assert ticket().sparsity == pytest.approx(6 / 14, abs=1e-15)


def test_model_sparsity_has_its_own_denominator():
    assert ticket().model_sparsity() is None
    whole = Ticket.from_masks({"a.weight": A}, TicketOrigin(model_parameters=30))
    assert whole.model_sparsity() == 3 / 30


def test_sparsity_by_site_has_one_entry_per_expert():
    assert ticket().sparsity_by_site() == {"a.weight": 0.5, "experts.up[0]": 0.0, "experts.up[1]": 0.75}


def test_overlap_and_distance():
    other = A.clone()
    other[0] = torch.tensor([0, 1, 1])  # differs at 3 of 14 weights; 7 kept by both, 10 by either
    one, two = ticket(), ticket(**{"a.weight": other})
    assert one.overlap(two) == two.overlap(one) == 7 / 10
    assert one.distance(two) == two.distance(one) == 3 / 14
    assert (one.overlap(one), one.distance(one)) == (1.0, 0.0)


def test_comparison_does_not_depend_on_the_order_of_masks():
    turned = Ticket.from_masks({"experts.up": B, "a.weight": A})
    assert (ticket().overlap(turned), ticket().distance(turned)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "other", [{"a.weight": A}, {"a.weight": A.T, "experts.up": B}, {"b.weight": A, "experts.up": B}]
)
def test_other_matrices_cannot_be_compared(other):
    for compare in (ticket().overlap, ticket().distance):
        with pytest.raises(ValueError, match="Only tickets of the same matrices can be compared, `"):
            compare(Ticket.from_masks(other))


def test_unknown_name_lists_near_ones():
    with pytest.raises(KeyError, match=r"no mask for `a.weights`. \(near names: a.weight\)"):
        ticket().mask("a.weights")


def test_repr():
    found = Ticket.from_masks({"a.weight": A}, TicketOrigin(method="lottery_ticket"))
    assert repr(found) == "Ticket(sparsity=0.5000, weights=6, method='lottery_ticket')"
    assert repr(ticket()) == "Ticket(sparsity=0.4286, weights=14, method=None)"


@pytest.mark.parametrize(
    ("bits", "shapes"),
    [
        ({}, {}),
        ({"a": torch.zeros(1, dtype=torch.uint8)}, {}),
        ({"a": torch.zeros(1, dtype=torch.uint8)}, {"b": (2, 2)}),
        ({"a": torch.zeros(0, dtype=torch.uint8)}, {"a": (0, 3)}),
    ],
)
def test_ticket_without_weights_is_refused(bits, shapes):
    with pytest.raises(ValueError, match="A ticket needs a mask and a shape of each matrix"):
        Ticket(bits, shapes)


def test_masks_must_be_bool():
    with pytest.raises(ValueError, match="must be a bool tensor"):
        Ticket.from_masks({"a": A.float()})


@pytest.mark.parametrize(("family", "head"), [("bert", "base"), ("gpt2", "causal_lm"), ("mixtral", "causal_lm")])
def test_from_model_reads_the_zeros(family, head):
    model = tiny_model(family, head)
    pruned = prune(model, 0.4)
    read = Ticket.from_model(model)
    assert read.distance(pruned) == 0
    assert read.origin.model_type == family
    assert read.origin.model_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_from_model_takes_a_zero_for_pruned():
    model = tiny_model("bert")
    assert Ticket.from_model(model, include="pooler.dense.weight").sparsity == 0
    with torch.no_grad():
        model.pooler.dense.weight[0] = -0.0
    assert Ticket.from_model(model, include="pooler.dense.weight").sparsity == 1 / 32


def test_from_model_looks_only_at_the_sites_asked_for():
    model = tiny_model("mixtral")
    name = "layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        named_canonical_parameters(model)[name][:2] = 0
    read = Ticket.from_model(model, include=[f"{name}[1]", f"{name}[2]"])
    assert list(read.sparsity_by_site().values()) == [0, 1, 0, 0]  # expert 0 was not asked for, expert 2 is dense


def test_every_site_of_a_model_is_in_its_ticket():
    model = tiny_model("mixtral", "causal_lm")
    assert set(Ticket.from_model(model).sparsity_by_site()) == {site.name for site in find_sites(model)}
