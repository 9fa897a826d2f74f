"""The fingerprint tells base weights apart and nothing else."""

import copy

import pytest
import torch

from sparse_hf.algorithms.bits import pack_bits
from sparse_hf.anatomy import named_canonical_parameters
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.prune import prune
from tiny_models import tiny_model


def fingerprint(model, ticket):
    return base_fingerprint(named_canonical_parameters(model), ticket.bits)


@pytest.fixture(scope="module")
def dense():
    return tiny_model("bert", "sequence_classification")


@pytest.fixture(scope="module")
def ticket(dense):
    return prune(copy.deepcopy(dense), 0.5)


def test_is_recorded_and_of_fixed_length(dense, ticket):
    assert fingerprint(dense, ticket) == ticket.origin.base_fingerprint
    assert len(ticket.origin.base_fingerprint) == 64


def test_stays_after_apply(dense, ticket):
    assert fingerprint(ticket.apply(copy.deepcopy(dense)), ticket) == fingerprint(dense, ticket)


def test_is_that_of_the_model_loaded_in_bfloat16(dense, ticket):
    half = copy.deepcopy(dense).to(torch.bfloat16)
    assert fingerprint(half, ticket) == fingerprint(dense, ticket)
    assert fingerprint(ticket.apply(half), ticket) == fingerprint(dense, ticket)


def test_does_not_depend_on_head_or_pooler(dense, ticket):
    other = tiny_model("bert", "token_classification", seed=1)
    other.base_model.load_state_dict(dense.base_model.state_dict(), strict=False)
    assert fingerprint(other, ticket) == fingerprint(dense, ticket)


def test_changes_with_one_kept_weight_only():
    weight = torch.ones(2, 2)
    bits = {"a": pack_bits(torch.tensor([[True, False], [True, True]]))}
    known = base_fingerprint({"a": weight}, bits)
    pruned_changed, kept_changed = weight.clone(), weight.clone()
    pruned_changed[0, 1] = float("nan")
    kept_changed[1, 1] = 1.01
    assert base_fingerprint({"a": pruned_changed}, bits) == known
    assert base_fingerprint({"a": kept_changed}, bits) != known


def test_changes_with_name_shape_and_mask():
    weight = torch.ones(2, 2)
    bits = pack_bits(torch.ones(2, 2, dtype=torch.bool))
    known = base_fingerprint({"a": weight}, {"a": bits})
    assert base_fingerprint({"b": weight}, {"b": bits}) != known
    assert base_fingerprint({"a": weight.view(4, 1)}, {"a": bits}) != known
    assert base_fingerprint({"a": weight}, {"a": pack_bits(torch.eye(2, dtype=torch.bool))}) != known


def test_leaves_weights_alone_and_ignores_order_and_strides():
    parameters = {name: torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    bits = {name: pack_bits(torch.arange(12).reshape(3, 4) % 2 == 0) for name in "ab"}
    known = base_fingerprint(parameters, bits)
    assert base_fingerprint(parameters, {name: bits[name] for name in "ba"}) == known
    strided = {name: tensor.T.contiguous().T for name, tensor in parameters.items()}
    assert base_fingerprint(strided, bits) == known
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    bfloat = {name: tensor.bfloat16() for name, tensor in parameters.items()}
    copies = {name: tensor.clone() for name, tensor in bfloat.items()}
    base_fingerprint(bfloat, bits)
    assert all(torch.equal(bfloat[name], copies[name]) for name in bfloat)
