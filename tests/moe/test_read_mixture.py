"""Router and experts are found in every architecture's checkpoint, and what is no whole mixture is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.read_mixture import TARGETS, read_mixture
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense


FAMILIES = {pair.target.model_type: source for source, pairs in reversed(PAIRS.items()) for pair in pairs}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def make(tmp_path, target="mixtral"):
    save_dense(tmp_path / "dense", FAMILIES[target])
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, check_tokens=0, progress=False, target=target)
    return tmp_path / "moe"


def change(folder, by):
    tensors = load_file(folder / "model.safetensors")
    by(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def numbers(stored):
    data = bytearray(stored.file.read_bytes()[stored.offset : stored.offset + stored.length])
    return torch.frombuffer(data, dtype=torch.float32).reshape(stored.shape)


@pytest.mark.parametrize("target", TARGETS)
def test_every_expert_is_the_dense_ffn(tmp_path, target):
    mixture = read_mixture(make(tmp_path, target))
    assert (mixture.target, mixture.experts, mixture.top_k) == (TARGETS[target], 3, 2)
    assert list(mixture.layers) == [0, 1]
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for layer, one in mixture.layers.items():
        assert one.router.shape == (3, 32)
        assert len(one.beside) == len(TARGETS[target].zeros)
        assert len(one.shared) in (0, 3)
        for expert in one.experts:
            gate, up, down = (numbers(expert[matrix]) for matrix in ("gate_proj", "up_proj", "down_proj"))
            prefix = f"model.layers.{layer}."
            if target == "lfm2_moe":
                theirs = [dense[f"{prefix}feed_forward.{name}.weight"] for name in ("w1", "w3", "w2")]
            else:
                theirs = [dense[f"{prefix}mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
            assert all(torch.equal(*both) for both in zip((gate, up, down), theirs, strict=True))


def test_no_mixture(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="must hold a mixture of mixtral, .*, got 'llama'"):
        read_mixture(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_mixture(tmp_path)


@pytest.mark.parametrize(
    ("by", "match"),
    [
        (lambda tensors: tensors.pop(EXPERT), f"`{EXPERT}` is missing"),
        (lambda tensors: tensors.pop(ROUTER), f"`{ROUTER}` is missing"),
        (
            lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].clone()}),
            r"w1.weight` must be \[64, 32\] as the config says, got \[63, 32\]",
        ),
        (lambda tensors: tensors.update({EXPERT: tensors[EXPERT].half()}), "one dtype, got F16, F32"),
        (lambda tensors: tensors.update({f"{EXPERT}_scale": torch.ones(1)}), f"`{EXPERT}_scale` too: it is quantised"),
        (
            lambda tensors: tensors.update({EXPERT.replace("s.2", "s.3"): tensors[EXPERT].clone()}),
            "experts.3.w1.weight` too",
        ),
        (
            lambda tensors: tensors.update({EXPERT.replace("s.1", "s.2"): tensors[EXPERT].clone()}),
            "layers 0 to 1 of its config, it holds layer 2",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0.block" in name],
            "layer 0 has neither experts nor FFN",
        ),
        (
            lambda tensors: [
                tensors.update({name.replace("experts", "parts"): tensors.pop(name)})
                for name in list(tensors)
                if "layers.1.block" in name
            ],
            "`model.layers.1.block_sparse_moe.experts.0.w1.weight` is missing",
        ),
    ],
)
def test_damaged_checkpoints(tmp_path, by, match):
    folder = make(tmp_path)
    change(folder, by)
    with pytest.raises(ValueError, match=match):
        read_mixture(folder)


def test_a_bias_in_one_layer_only(tmp_path):
    folder = make(tmp_path, "glm4_moe")
    change(folder, lambda tensors: tensors.pop(BIAS))
    with pytest.raises(ValueError, match="layer 0 has beside tensors and layer 1 has none"):
        read_mixture(folder)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"num_local_experts": 4}, r"gate.weight` must be \[4, 32\] as the config says, got \[3, 32\]"),
        ({"num_local_experts": 2}, r"must be \[2, 32\]"),
        ({"intermediate_size": 65}, r"must be \[65, 32\]"),
        ({"num_hidden_layers": 3}, "layer 2 has neither experts nor FFN"),
    ],
)
def test_the_config_of_another(tmp_path, entries, match):
    folder = make(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(ValueError, match=match):
        read_mixture(folder)
