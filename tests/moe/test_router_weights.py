"""Gradients reach routers' weights by the graph of a forward pass, as they do where ranks hold parts of them."""

import pytest
import torch
from torch import nn

from sparse_hf.moe.router_weights import Place, RouterWeights, zero_with


def routers_and_weights(frozen=()):
    routers = [nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Sequential(nn.Linear(3, 4))]
    linears = [routers[0], routers[1], routers[2][0]]
    for position in frozen:
        linears[position].requires_grad_(False)
    trained = [lambda one=one: (one.weight, one.bias) if one.weight.requires_grad else None for one in linears]
    return routers, linears, RouterWeights(routers, trained)


def test_gradients_are_added_to_those_of_the_pass():
    routers, linears, weights = routers_and_weights(frozen=[1])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with weights.holding(copying=True) as places:
        loss = sum(router(x).square().sum() for router in routers)
    assert [place is None for place in places] == [False, True, False]
    assert torch.equal(places[0].copies[0], linears[0].weight)
    given = [(torch.full((4, 3), 2.0), torch.full((4,), 3.0)), None, (torch.full((4, 3), 5.0), torch.ones(4))]
    loss.backward(retain_graph=True)
    alone = [None if one.weight.grad is None else (one.weight.grad.clone(), one.bias.grad.clone()) for one in linears]
    for one in linears:
        one.zero_grad()
    (7 * (loss + zero_with(places, given))).backward()
    for one, own, gradients in zip(linears, alone, given, strict=True):
        if gradients is None:
            assert one.weight.grad is None
        else:
            assert torch.allclose(one.weight.grad, 7 * (own[0] + gradients[0]))
            assert torch.allclose(one.bias.grad, 7 * (own[1] + gradients[1]))
    weights.detach()
    with weights.holding(copying=False) as places:
        routers[0](x)
    assert places == [None, None, None]


def test_a_pass_without_a_graph():
    routers, _, weights = routers_and_weights()
    with weights.holding(copying=False) as places, torch.no_grad():
        for router in routers:
            router(torch.ones(1, 3))
    with pytest.raises(ValueError, match="must run with `use_reentrant=False`"):
        zero_with(places, [(torch.ones(4, 3), None)] * 3)


def test_weights_that_are_whole_need_no_pass():
    weight = torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)
    zero_with([Place.of(weight, None)], [(torch.ones(4, 3), None)]).backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
