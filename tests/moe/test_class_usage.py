"""Choices are counted by the class of their token, given per row or per token."""

import pytest
import torch

from moe.every_family import EXPERTS, STOCK_FAMILIES, every_family
from sparse_hf import usage_by_class


CLASSES = ("prose", "code", "none")
IDS = torch.randint(3, 96, (4, 6), generator=torch.Generator().manual_seed(0))
DOMAIN = torch.tensor([0, 1, 0, -100])
MASK = torch.ones_like(IDS)
MASK[0, 4:] = 0


def batch(domain=DOMAIN, **changes):
    return {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "domain": domain, **changes}


def routed(model):
    """(layers, rows, length, 2) experts, by the router of Mixtral."""
    with torch.no_grad():
        logits = model(IDS, attention_mask=MASK, output_router_logits=True).router_logits
    return torch.stack(logits).topk(2).indices.view(2, 4, 6, 2)


def expected(choices, labels):
    counts = torch.zeros(3, 2, EXPERTS, dtype=torch.int64)
    for layer, row, place in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6)).tolist():
        if labels[row, place] >= 0 and MASK[row, place]:
            counts[labels[row, place], layer][choices[layer, row, place]] += 1
    return counts


def test_domains():
    model = every_family("mixtral")
    usage = usage_by_class(model, [batch(), batch()], "domain", CLASSES)
    assert torch.equal(usage.counts, 2 * expected(routed(model), DOMAIN[:, None].expand_as(IDS)))
    assert usage.counts.sum((1, 2)).tolist() == [2 * 2 * 2 * 10, 2 * 2 * 2 * 6, 0]
    assert usage.layers == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert (usage.classes, usage.top_k) == (CLASSES, 2)


def test_classes_of_tokens():
    model = every_family("mixtral")
    kinds = IDS % 4 - 1
    usage = usage_by_class(model, [batch(kinds)], "domain", CLASSES)
    assert torch.equal(usage.counts, expected(routed(model), kinds))


@pytest.mark.parametrize("model_type", STOCK_FAMILIES)
def test_every_family(model_type):
    usage = usage_by_class(every_family(model_type), [batch()], "domain", CLASSES)
    assert usage.counts.shape == (3, 2, EXPERTS)
    assert usage.counts.sum((0, 2)).tolist() == [2 * 16] * 2
    found = usage.specialisation()
    assert (found.information >= 0).all()
    assert 0 < found.class_entropy < 1


def test_a_router_that_tells_classes_apart_is_found():
    """Tokens of two ids, whose embeddings a router of the first layer tells apart."""
    model = every_family("mixtral", num_experts_per_tok=1)
    ids = torch.tensor([[5] * 6, [9] * 6])
    with torch.no_grad():
        hidden = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        model(ids)
        handle.remove()
        model.model.layers[0].mlp.gate.weight.zero_()
        model.model.layers[0].mlp.gate.weight[2] = (hidden[0][1] - hidden[0][0]).mean(0)
        model.model.layers[0].mlp.gate.weight[1] = -model.model.layers[0].mlp.gate.weight[2]
    usage = usage_by_class(model, [{"input_ids": ids, "domain": torch.tensor([0, 1])}], "domain", ("a", "b"))
    assert usage.counts[:, 0].tolist() == [[0, 6, 0, 0], [0, 0, 6, 0]]
    found = usage.specialisation()
    assert found.information[0].item() == pytest.approx(1)
    assert found.class_entropy == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([0, 1, 0, 3]), "numbers below 3, one per name"),
        (torch.tensor([0.0, 1, 0, 1]), "whole numbers, one per row or per token of 24, got torch.float32"),
        (torch.zeros(4, 5).long(), r"per token of 24, got torch.int64 of shape \[4, 5\]"),
        (torch.tensor([-1, -1, -1, -1]), "at least one token that is labelled"),
    ],
)
def test_wrong_labels(wrong, message):
    with pytest.raises(ValueError, match=message):
        usage_by_class(every_family("mixtral"), [batch(wrong)], "domain", CLASSES)


def test_refusals():
    model = every_family("mixtral")
    with pytest.raises(ValueError, match="must have the column `topic`, got input_ids, attention_mask"):
        usage_by_class(model, [batch()], "topic", CLASSES)
    with pytest.raises(ValueError, match="must name each class once"):
        usage_by_class(model, [batch()], "domain", ("a", "a"))
    with pytest.raises(ValueError, match="call `model.eval"):
        usage_by_class(model.train(), [batch()], "domain", CLASSES)
    model.config.router = "expert_choice"
    with pytest.raises(ValueError, match="experts choose tokens"):
        usage_by_class(model.eval(), [batch()], "domain", CLASSES)
