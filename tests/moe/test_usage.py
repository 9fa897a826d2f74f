"""Usage counts what routers chose, for every architecture, and only for tokens that are not padding."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.moe.upcycle import upcycle
from sparse_hf.moe.usage import expert_usage, load_usage, save_usage
from tiny_dense import save_dense


FAMILIES = {pair.target.model_type: source for source, pairs in reversed(PAIRS.items()) for pair in pairs}
# Those whose scores are no softmax of the router's logits.
SIGMOID = {"glm4_moe", "dots1", "lfm2_moe"}


def mixture(tmp_path, target="mixtral", **options):
    save_dense(tmp_path / "dense", FAMILIES[target])
    options = {"experts": 4, "check_tokens": 0, "progress": False, "router_std": 0.5, "target": target, **options}
    upcycle(tmp_path / "dense", tmp_path / "moe", **options)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()


def batches(count=2, padding=0):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 96, (3, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def router_inputs(model, batch):
    """What each router sees, and its weight."""
    seen = {}
    hooks = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[-1] == "weight" and ("router" in parts or "gate" in parts):
            end = parts.index("router" if "router" in parts else "gate") + 1
            module = model.get_submodule(".".join(parts[:end]))
            layer, weight = int(parts[2]), parameter.detach()
            hooks.append(module.register_forward_pre_hook(
                lambda _, arguments, layer=layer, weight=weight: seen.update({layer: (arguments[0], weight)})
            ))  # fmt: skip
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("target", TARGETS)
def test_counts_are_those_of_the_routers_logits(tmp_path, target):
    model = mixture(tmp_path, target)
    usage = expert_usage(model, batches(padding=3))
    counts = {layer: torch.zeros(4, dtype=torch.int64) for layer in (0, 1)}
    weights = {layer: torch.zeros(4, dtype=torch.float64) for layer in (0, 1)}
    for batch in batches(padding=3):
        seen = router_inputs(model, batch)
        assert seen.keys() == counts.keys()
        for layer, (hidden, weight) in seen.items():
            scores = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
            scores = scores.sigmoid() if target in SIGMOID else scores.exp()
            for token, counted in zip(scores.double(), batch["attention_mask"].flatten(), strict=True):
                best = token.topk(2).indices
                if counted:
                    counts[layer][best] += 1
                    weights[layer][best] += token[best] / token[best].sum()
    for layer in counts:
        assert torch.equal(usage.counts[layer], counts[layer])
        assert int(usage.counts[layer].sum()) == 2 * (2 * 21 - 2 * 3)
        assert torch.allclose(usage.weights[layer], weights[layer], atol=1e-4)


def test_without_a_mask_every_token_counts(tmp_path):
    model = mixture(tmp_path)
    whole = expert_usage(model, batches())
    bare = expert_usage(
        model, ({"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in batches())
    )
    assert all(torch.equal(whole.counts[layer], bare.counts[layer]) for layer in (0, 1))


def test_padding_counts_as_if_it_were_not_there(tmp_path):
    model = mixture(tmp_path)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    padded = {
        "input_ids": torch.cat([ids, ids[:, :4]], dim=1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 4]),
    }
    alone, beside = expert_usage(model, [{"input_ids": ids}]), expert_usage(model, [padded])
    assert all(torch.equal(alone.counts[layer], beside.counts[layer]) for layer in (0, 1))


def test_nothing_of_the_model_changes(tmp_path):
    model = mixture(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expert_usage(model, batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_layers_with_experts(tmp_path):
    usage = expert_usage(mixture(tmp_path, "qwen3_moe", layers=[1]), batches())
    assert list(usage.counts) == list(usage.weights) == [1]


def test_saved_and_loaded(tmp_path):
    usage = expert_usage(mixture(tmp_path), batches())
    save_usage(usage, tmp_path / "usage.json")
    again = load_usage(tmp_path / "usage.json")
    for part in ("counts", "weights"):
        ours, theirs = getattr(usage, part), getattr(again, part)
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(ours[layer], theirs[layer]) and ours[layer].dtype == theirs[layer].dtype for layer in ours
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "ticket"}, "its kind is 'ticket'"),
        ({"layers": {}}, "must hold the usage of experts"),
        ({"layers": {"one": {"counts": [1], "weights": [1.0]}}}, "must have a number.*got 'one'"),
        ({"layers": {"0": {"counts": [1]}}}, "`counts` and `weights`, got '0'"),
        ({"layers": {"0": {"counts": [-1], "weights": [1.0]}}}, "of layer 0 .* numbers of 0 or more"),
        ({"layers": {"0": {"counts": [1.5], "weights": [1.0]}}}, "of layer 0 .* numbers of 0 or more"),
        ({"layers": {"0": {"counts": [1, 2], "weights": [1.0]}}}, "as many `counts` as `weights`"),
    ],
)
def test_files_of_something_else(tmp_path, change, match):
    content = {"kind": "expert_usage", "layers": {"0": {"counts": [1], "weights": [1.0]}}}
    (tmp_path / "usage.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=match):
        load_usage(tmp_path / "usage.json")


def test_what_cannot_be_counted(tmp_path):
    model = mixture(tmp_path)
    with pytest.raises(ValueError, match="at least one token"):
        expert_usage(model, [])
    with pytest.raises(ValueError, match=r"of the 21 tokens as \(batch, length\), got \[3, 1, 7, 7\]"):
        expert_usage(model, [{**next(batches()), "attention_mask": torch.ones(3, 1, 7, 7)}])
    model.train()
    with pytest.raises(ValueError, match=r"call `model.eval\(\)`"):
        expert_usage(model, batches())
    with pytest.raises(ValueError, match="Routers can be read of mixtral, .*, got a model of type 'llama'"):
        expert_usage(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), batches())


def test_experts_that_are_called_in_another_way(tmp_path):
    model = mixture(tmp_path)
    block = model.model.layers[1].mlp
    whole = block.forward
    block.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match=r"layers\.1\.mlp` must be called once .* got 0 calls"):
        expert_usage(model, batches())
    block.forward = whole
    inner = block.experts.forward
    block.experts.forward = lambda hidden, weights, chosen: inner(hidden, chosen, weights)
    block.gate.register_forward_hook(lambda module, inputs, outputs: (outputs[0], outputs[2], outputs[1]))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp` must .* numbers below 4 .* got 1 calls"):
        expert_usage(model, batches())
    assert not any(module._forward_pre_hooks for module in model.modules())
