"""A mixture becomes the dense model again: what was upcycled comes back byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_hf.moe.densify import densify
from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense


ALL = [(source, pair.target.model_type) for source, pairs in PAIRS.items() for pair in pairs]
UP = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"


def make(tmp_path, family="llama", target=None, dtype=torch.float32, changes=None, **options):
    """A dense model and its mixture of 3 experts: thirds are no numbers of a computer."""
    dense = save_dense(tmp_path / "dense", family, dtype, **(changes or {}))
    options = {"experts": 3, "check_tokens": 0, "progress": False, "target": target, **options}
    upcycle(tmp_path / "dense", tmp_path / "moe", **options)
    return dense


def back(tmp_path, name="back", **options):
    assert densify(tmp_path / "moe", tmp_path / name, progress=False, **options)
    return weights(tmp_path / name)


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change(folder, name, by):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = by(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_entry(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def logits(model):
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("family", "target"), ALL)
def test_what_was_upcycled_comes_back(tmp_path, family, target):
    dense = make(tmp_path, family, target)
    again, before = back(tmp_path), weights(tmp_path / "dense")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(model) is type(dense)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_shards(tmp_path, dtype):
    make(tmp_path, dtype=dtype)
    again, before = back(tmp_path, max_shard_bytes=20_000, expert=2), weights(tmp_path / "dense")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == dtype


def test_one_expert_and_averages_by_hand(tmp_path):
    make(tmp_path)
    change(tmp_path / "moe", UP.format(0), lambda up: 0 * up + 1)
    change(tmp_path / "moe", UP.format(1), lambda up: 0 * up + 2)
    change(tmp_path / "moe", UP.format(2), lambda up: 0 * up + 6)
    name = "model.layers.1.mlp.up_proj.weight"
    usage = {0: torch.ones(3), 1: torch.tensor([3, 1, 0])}
    unused = {0: torch.ones(3), 1: torch.zeros(3)}
    for number, (options, expected) in enumerate(
        [
            ({"expert": 2}, 6.0),
            ({}, 3.0),
            ({"usage": usage}, 1.25),
            ({"usage": unused}, 3.0),
        ]
    ):
        up = back(tmp_path, f"back{number}", **options)[name]
        assert torch.allclose(up, torch.full_like(up, expected))


def test_a_fused_mixture_by_hand(tmp_path):
    make(tmp_path, "granite", "granitemoe")
    before = weights(tmp_path / "dense")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"  # (experts, gate rows over up rows, hidden)
    change(tmp_path / "moe", name, lambda both: torch.stack([both[0], both[1] + 3, both[2]]))
    again = back(tmp_path)
    for matrix in ("gate_proj", "up_proj"):
        dense = f"model.layers.0.mlp.{matrix}.weight"
        assert torch.allclose(again[dense], before[dense] + 1, atol=1e-6)
    assert torch.equal(again["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"])


def test_layers_that_are_dense_stay(tmp_path):
    dense = make(tmp_path, "qwen3", layers=[1])
    back(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(dense))


def test_a_shared_expert_that_adds_something(tmp_path):
    make(tmp_path, "qwen2")
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    change(tmp_path / "moe", name, lambda down: down + torch.eye(*down.shape) * 1e-6)
    with pytest.raises(ValueError, match=f"`{name}` is not all zeros. Set `ignore_shared`"):
        back(tmp_path)
    again, before = back(tmp_path, ignore_shared=True), weights(tmp_path / "dense")
    assert again.keys() == before.keys()


def test_which_dense_model(tmp_path):
    make(tmp_path, "mistral", "mixtral")
    (tmp_path / "moe" / "sparse_hf.json").unlink()
    with pytest.raises(ValueError, match="came from, one of llama, mistral, .*, got None"):
        back(tmp_path)
    with pytest.raises(ValueError, match="got 'gpt2'"):
        back(tmp_path, target="gpt2")
    back(tmp_path, target="llama")
    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == "llama"
    about = json.loads((tmp_path / "back" / "sparse_hf.json").read_text())
    assert (about["source_type"], about["target_type"]) == ("mixtral", "llama")


@pytest.mark.parametrize(
    ("family", "target", "entries", "match"),
    [
        ("llama", "mixtral", {"sliding_window": 5}, "only if `sliding_window` is None, got 5"),
        ("qwen3", "qwen3_moe", {"norm_topk_prob": False}, "only if `norm_topk_prob` is True, got False"),
        ("llama", "glm4_moe", {"routed_scaling_factor": 2.5}, "only if `routed_scaling_factor` is 1.0, got 2.5"),
        ("llama", "glm4_moe", {"attention_bias": True}, "only if `attention_bias` is False, got True"),
        ("llama", "mixtral", {"hidden_act": "gelu"}, "only if `hidden_act` is 'silu', got 'gelu'"),
    ],
)
def test_what_a_dense_model_cannot_say(tmp_path, family, target, entries, match):
    make(tmp_path, family, target)
    set_entry(tmp_path / "moe", **entries)
    with pytest.raises(ValueError, match=match):
        back(tmp_path)
    assert not (tmp_path / "back").exists()


def test_tensors_that_a_dense_model_does_not_have(tmp_path):
    make(tmp_path, "qwen3", "glm4_moe", changes={"head_dim": 8})
    set_entry(tmp_path / "moe", use_qk_norm=False)
    with pytest.raises(
        ValueError, match=r"`model.layers.0.self_attn.k_norm.weight` of a llama .* absent.*gives \[8\]"
    ):
        back(tmp_path, target="llama")


def test_parts_are_no_ffn(tmp_path):
    make(tmp_path, "llama", init=ExpertInit(granularity=2), top_k=2)
    with pytest.raises(ValueError, match="are parts of an FFN"):
        back(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"expert": 3}, "'average' or a number from 0 to 2, got 3"),
        ({"expert": "mean"}, "got 'mean'"),
        ({"expert": 1, "usage": {0: torch.ones(3), 1: torch.ones(3)}}, "leave one of them out"),
        ({"usage": {0: torch.ones(3)}}, r"each of the mixture's layers \[0, 1\].*got \[0\]"),
        ({"usage": {0: torch.ones(3), 1: -torch.ones(3)}}, "of layer 1 must be 3 numbers of 0 or more"),
    ],
)
def test_arguments(tmp_path, options, match):
    make(tmp_path)
    with pytest.raises(ValueError, match=match):
        back(tmp_path, **options)


def test_another_run_goes_on_and_another_plan_does_not(tmp_path):
    make(tmp_path)
    first = back(tmp_path)
    (tmp_path / "back" / "config.json").unlink()
    change(tmp_path / "moe", UP.format(1), lambda up: up + 1)
    with pytest.raises(ValueError, match="another plan"):
        back(tmp_path)
    back(tmp_path, "other")
    (tmp_path / "other" / "config.json").unlink()
    assert back(tmp_path, "other").keys() == first.keys()
    with pytest.raises(FileExistsError, match="holds a model already"):
        back(tmp_path, "other")
