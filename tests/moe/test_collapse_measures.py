"""Collapse is measured in every family, on tokens that are not padding, and found where it is made."""

import pytest
import torch

from moe.every_family import EXPERTS, STOCK_FAMILIES, every_family
from sparse_hf import measure_collapse
from sparse_hf.algorithms.representation_collapse import effective_rank
from sparse_hf.moe.collapse_measures import TokenSample
from sparse_hf.moe.expert_calls import ExpertCall


def batches(count=2, padding=0):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 96, (3, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7 - padding :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("model_type", STOCK_FAMILIES)
def test_every_family(model_type):
    model = every_family(model_type)
    found = measure_collapse(model, batches())
    assert len(found.layers) == 2
    assert found.tokens == 42
    assert (found.effective_rank > 1).all()
    assert (found.effective_rank <= 16).all()
    diagonal = found.weight_similarity.diagonal(dim1=1, dim2=2)
    assert torch.allclose(diagonal, torch.ones_like(diagonal))
    assert torch.allclose(found.output_similarity.diagonal(dim1=1, dim2=2), diagonal, atol=1e-5)
    assert found.log_entries()["expert_weight_similarity"] < 0.5


def test_against_what_the_experts_are_given():
    model, seen = every_family("mixtral"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    found = measure_collapse(model, batches(padding=4), compared_tokens=1000)
    masks = [batch["attention_mask"].bool() for batch in batches(padding=4)]
    hidden = torch.cat([one[mask] for one, mask in zip(seen, masks, strict=True)])
    assert found.tokens == len(hidden) == 2 * (21 - 4)
    expected = effective_rank(torch.cov(hidden.double().T, correction=0))
    assert found.effective_rank[0].item() == pytest.approx(expected, rel=1e-4)
    experts, outputs = model.model.layers[0].mlp.experts, []
    for one in range(EXPERTS):
        gate, up = (hidden @ experts.gate_up_proj[one].T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ experts.down_proj[one].T)
    cosine = torch.nn.functional.cosine_similarity(outputs[1], outputs[3], dim=-1).mean()
    assert found.output_similarity[0, 1, 3].item() == pytest.approx(cosine.item(), abs=1e-5)
    weights = [torch.cat([experts.gate_up_proj[one].flatten(), experts.down_proj[one].flatten()]) for one in (1, 3)]
    cosine = torch.nn.functional.cosine_similarity(*weights, dim=0)
    assert found.weight_similarity[0, 1, 3].item() == pytest.approx(cosine.item(), abs=1e-6)


def test_collapse_is_found():
    """Experts of the second layer are made equal; then all tokens are."""
    model = every_family("mixtral")
    with torch.no_grad():
        for stack in model.model.layers[1].mlp.experts.parameters():
            stack.copy_(stack[:1].expand_as(stack))
    entries = measure_collapse(model, batches()).log_entries()
    assert entries["expert_weight_similarity_worst_layer"] == pytest.approx(1)
    assert entries["expert_output_similarity_worst_layer"] == pytest.approx(1, abs=1e-5)
    assert entries["expert_weight_similarity"] < 0.6
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]
    collapsed = measure_collapse(model, batches()).log_entries()
    assert collapsed["effective_rank_worst_layer"] < 1.01 < entries["effective_rank_worst_layer"]


def test_the_sample_is_even_and_the_same_in_every_layer():
    taken = torch.zeros(40)
    for seed in range(300):
        sample = TokenSample(4, seed)
        for part in torch.arange(40.0)[:, None].split([7, 13, 20]):
            chosen = torch.zeros(len(part), 1, dtype=torch.int64)
            calls = {
                "first": ExpertCall(part, chosen, part[:, :1]),
                "second": ExpertCall(part + 100, chosen, part[:, :1]),
            }
            sample.add(calls, part[:, 0] != 3)
        assert sample.hidden["first"].shape == (4, 1)
        assert torch.equal(sample.hidden["second"], sample.hidden["first"] + 100)
        taken[sample.hidden["first"][:, 0].long()] += 1
    assert taken[3] == 0
    assert taken[:20].sum() / 1200 == pytest.approx(19 / 39, abs=0.05)


def test_refusals():
    model = every_family("mixtral")
    with pytest.raises(ValueError, match="call `model.eval\\(\\)`"):
        measure_collapse(model.train(), batches())
    model.eval()
    with pytest.raises(ValueError, match="at least one token"):
        measure_collapse(model, [])
    with pytest.raises(ValueError, match="`compared_tokens` must be 1 or more, got 0"):
        measure_collapse(model, batches(), compared_tokens=0)
    with pytest.raises(
        ValueError, match=r"must tell padding of the 14 tokens as \(batch, length\), got \[2, 1, 7, 7\]"
    ):
        measure_collapse(model, [{"input_ids": torch.ones(2, 7).long(), "attention_mask": torch.ones(2, 1, 7, 7)}])
    model.model.layers[0].mlp.experts.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="must be stacks of 4 matrices"):
        measure_collapse(model, batches())
