"""Experts of mixtures of ours that are more than copies of one FFN."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from sparse_hf import ExpertInit
from tiny_mixtures import convert, tiny_dense


# variant -> the FFN of layer 1 on disk: block, up matrices, down; Conv1D has neurons in the other dimension
FFNS = {
    "bert-base": ("encoder.layer.1.output.dense", ("encoder.layer.1.intermediate.dense",), None),
    "gpt2-base": ("h.1.mlp", ("h.1.mlp.c_fc",), "h.1.mlp.c_proj"),
    "t5-gated": (
        "encoder.block.1.layer.1.DenseReluDense",
        ("encoder.block.1.layer.1.DenseReluDense.wi_0", "encoder.block.1.layer.1.DenseReluDense.wi_1"),
        "encoder.block.1.layer.1.DenseReluDense.wo",
    ),
}


def save(folder, variant, seed=0):
    model = tiny_dense(variant)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.01 * seed)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def stacks(folder, variant, dense):
    """Up and down stacks and their bias, experts first, neurons second, and the same of the dense FFN."""
    block, ups, down = FFNS[variant]
    weights = load_file(folder / "model.safetensors")
    up_name = "gate_up_proj" if len(ups) > 1 else "up_proj"
    up, below = weights[f"{block}.experts.{up_name}"], weights[f"{block}.experts.down_proj"]
    dense_up, dense_down = [dense[f"{one}.weight"] for one in ups], dense[f"{down or block}.weight"]
    if variant.startswith("gpt2"):
        up, dense_up = up.mT, [one.T for one in dense_up]
    else:
        below, dense_down = below.mT, dense_down.T
    found = {f"up{number}": part for number, part in enumerate(up.chunk(len(ups), dim=1))} | {"down": below}
    expected = {f"up{number}": part for number, part in enumerate(dense_up)} | {"down": dense_down}
    if not variant.startswith("t5"):
        found["bias"] = weights[f"{block}.experts.up_proj_bias"][..., None]
        expected["bias"] = dense[f"{ups[0]}.bias"][:, None]
        down_bias = dense[f"{down or block}.bias"]
        assert all(torch.equal(one, down_bias) for one in weights[f"{block}.experts.down_proj_bias"])
    return found, expected


@pytest.mark.parametrize("variant", FFNS)
def test_half_of_the_neurons_are_drawn_anew_in_all_matrices(tmp_path, variant):
    dense = save(tmp_path / "dense", variant)
    convert(tmp_path / "dense", tmp_path / "moe", init=ExpertInit(drop=0.5))
    found, expected = stacks(tmp_path / "moe", variant, dense)
    neurons = len(expected["down"])
    changed = {name: (one != expected[name]).any(-1) for name, one in found.items()}
    for one in changed.values():  # (experts, neurons)
        assert torch.equal(one, changed["down"])
    assert (changed["down"].sum(1) == neurons // 2).all()
    assert len({tuple(row.tolist()) for row in changed["down"]}) == 4
    for name, one in found.items():
        drawn, before = one[0, changed["down"][0]], expected[name][changed["down"][0]]
        assert abs(drawn.mean() - before.mean()) < before.std()
        assert 0.5 < drawn.std() / before.std() < 1.5
    assert AutoModel.from_pretrained(tmp_path / "moe").config.num_experts == 4
    said = json.loads((tmp_path / "moe" / "sparse_hf.json").read_text())
    assert not said["exact"]
    assert said["logits_difference"] > 1e-3


def test_noise_on_weights(tmp_path):
    dense = save(tmp_path / "dense", "bert-base")
    convert(tmp_path / "dense", tmp_path / "moe", init=ExpertInit(noise_std=0.01))
    found, expected = stacks(tmp_path / "moe", "bert-base", dense)
    assert torch.equal(found["bias"], expected["bias"].expand_as(found["bias"]))
    for name in ("up0", "down"):
        noise = found[name] - expected[name]
        assert 0.009 < noise.std() < 0.011
        assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("average", [False, True])
def test_experts_of_several_models(tmp_path, average):
    models = {name: save(tmp_path / name, "gpt2-base", seed) for seed, name in enumerate(("dense", "a", "b"))}
    branches = [tmp_path / "a", tmp_path / "b"]
    convert(tmp_path / "dense", tmp_path / "moe", branches=branches, average=average)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    for dense, kind in (("c_fc.weight", "up_proj"), ("c_proj.bias", "down_proj_bias")):
        for expert, one in enumerate(weights[f"h.0.mlp.experts.{kind}"]):
            assert torch.equal(one, models["ab"[expert % 2]][f"h.0.mlp.{dense}"])
    expected = (
        (models["a"]["wte.weight"] + models["b"]["wte.weight"]) / 2 if average else models["dense"]["wte.weight"]
    )
    assert torch.allclose(weights["wte.weight"], expected)


def test_branches_of_another_architecture(tmp_path):
    for name in ("dense", "other"):
        save(tmp_path / name, "bert-base")
    path = tmp_path / "other" / "config.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({**entries, "hidden_dropout_prob": 0.3}))
    options = {"branches": [tmp_path / "other"], "check_tokens": 0}
    convert(tmp_path / "dense", tmp_path / "moe", **options)  # what is idle in evaluation may differ
    path.write_text(json.dumps({**entries, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match="`num_attention_heads` is 4 in the source and 2 in"):
        convert(tmp_path / "dense", tmp_path / "again", **options)
    save(tmp_path / "gpt2", "gpt2-base")
    with pytest.raises(ValueError, match="must hold the same tensors"):
        convert(tmp_path / "dense", tmp_path / "again", branches=[tmp_path / "gpt2"])
