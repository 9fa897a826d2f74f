"""A ticket found under one head fits every other head of the same base, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from sparse_hf.anatomy import named_canonical_parameters
from sparse_hf.tickets.origin import origin_of
from sparse_hf.tickets.prune import prune
from sparse_hf.tickets.ticket import Ticket
from tiny_models import tiny_model


POOLER = "pooler.dense.weight"


def with_base_of(source, head):
    """A model under another head with the base weights of `source`."""
    model = tiny_model("bert", head, seed=1)
    model.base_model.load_state_dict(source.base_model.state_dict(), strict=False)
    return model


def bits_of(model):
    return {name: tensor.clone().view(torch.int32) for name, tensor in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(tensor.view(torch.int32), before[name]) for name, tensor in model.named_parameters())


@pytest.fixture
def found():
    """The dense model and the ticket found on it."""
    model = tiny_model("bert", "sequence_classification")
    return model, prune(copy.deepcopy(model), 0.5)


@pytest.mark.parametrize("head", ["token_classification", "base", "question_answering", "masked_lm"])
def test_applies_under_another_head(found, head):
    source, ticket = found
    model = with_base_of(source, head)
    before = {name: p.detach().clone() for name, p in named_canonical_parameters(model).items()}
    assert ticket.apply(model) is model
    after = named_canonical_parameters(model)
    for name, tensor in after.items():
        expected = before[name] * ticket.mask(name) if name in ticket.bits else before[name]
        assert torch.equal(tensor, expected), name
    assert (POOLER in after) == (head == "base")


def test_masks_for_leaves_out_the_pooler_that_is_not_there(found):
    source, ticket = found
    assert set(ticket.masks()) - set(ticket.masks_for(with_base_of(source, "token_classification"))) == {POOLER}
    assert set(ticket.masks_for(with_base_of(source, "base"))) == set(ticket.masks())


def test_a_ticket_of_the_pooler_alone_does_not_fit_without_pooler(found):
    source, ticket = found
    alone = Ticket.from_masks({POOLER: ticket.mask(POOLER)})
    with pytest.raises(ValueError, match=f"no parameter `{POOLER}`"):
        alone.apply(with_base_of(source, "token_classification"))


def test_applies_through_wrappers(found):
    source, ticket = found
    wrapped = nn.DataParallel(copy.deepcopy(source))
    assert Ticket.from_model(ticket.apply(wrapped)).distance(ticket) == 0


def test_pruned_positions_are_not_negative_zero(found):
    source, ticket = found
    ticket.apply(source)
    for name, tensor in named_canonical_parameters(source).items():
        if name in ticket.bits:
            assert not (torch.signbit(tensor) & (tensor == 0)).any()
            assert torch.equal(tensor != 0, ticket.mask(name))


@pytest.mark.parametrize("family", ["gpt2", "distilbert", "mixtral"])
def test_other_architecture_is_refused_and_unchanged(found, family):
    model = tiny_model(family)
    before = bits_of(model)
    with pytest.raises(
        ValueError, match=r"The ticket \(found on a bert\) does not fit .*Model: no parameter"
    ) as caught:
        found[1].apply(model)
    message = str(caught.value)
    assert message.count("no parameter") == 5
    assert "; and 8 more. Apply it to the architecture it was found on." in message  # 13 matrices
    assert unchanged(model, before)


def test_other_width_is_refused_and_unchanged(found):
    model = tiny_model("bert", intermediate_size=48)
    before = bits_of(model)
    with pytest.raises(ValueError, match="is .48, 32. of torch.float32, the mask .64, 32.") as caught:
        found[1].apply(model)
    assert "more" not in str(caught.value)  # four matrices of the MLPs, all shown
    assert str(caught.value).count("the mask") == 4
    assert unchanged(model, before)


def test_missing_layers_are_listed_with_near_names(found):
    with pytest.raises(ValueError, match=r"no parameter `encoder.layer.1.*near names: encoder.layer.0"):
        found[1].apply(tiny_model("bert", num_hidden_layers=1))


def test_quantised_weights_are_refused_before_any_change(found):
    source, ticket = found
    last = "encoder.layer.1.output.dense"
    linear = source.base_model.get_submodule(last)
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    before = source.base_model.encoder.layer[0].output.dense.weight.clone()
    with pytest.raises(ValueError, match=f"`{last}.weight` is .* of torch.float8_e4m3fn"):
        ticket.apply(source, check_base=False)
    assert torch.equal(source.base_model.encoder.layer[0].output.dense.weight, before)


def test_other_base_weights_are_refused(found):
    _, ticket = found
    model = tiny_model("bert", seed=9)
    before = bits_of(model)
    for attempt in (ticket.apply, ticket.check, ticket.masks_for):
        with pytest.raises(ValueError, match="found on other base weights .* pass `check_base=False`"):
            attempt(model)
    assert unchanged(model, before)
    assert Ticket.from_model(ticket.apply(model, check_base=False)).distance(ticket) == 0


def test_one_changed_weight_is_other_base_weights(found):
    source, ticket = found
    name = "encoder.layer.0.attention.self.query.weight"
    with torch.no_grad():
        named_canonical_parameters(source)[name][ticket.mask(name)] += 1
    with pytest.raises(ValueError, match="other base weights"):
        ticket.check(source)


def test_applied_twice_and_in_bfloat16(found):
    source, ticket = found
    ticket.apply(source)
    ticket.apply(source)
    half = ticket.apply(tiny_model("bert", "sequence_classification").to(torch.bfloat16))
    assert Ticket.from_model(half).distance(ticket) == 0


def test_ticket_without_a_recorded_base_applies_to_any(found):
    _, ticket = found
    model = tiny_model("bert", seed=9)
    anonymous = Ticket.from_masks(ticket.masks(), origin_of(model))
    assert Ticket.from_model(anonymous.apply(model)).distance(ticket) == 0
