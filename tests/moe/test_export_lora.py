"""Low-rank factors per expert become a native checkpoint that computes what the adapted model computes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_hf.moe.export_lora import export_merged
from sparse_hf.moe.fingerprint import fingerprint
from sparse_hf.moe.shared_storage import load_with_shared_experts
from sparse_hf.moe.upcycle import upcycle
from tiny_adapter import UPCYCLING, change_config, save_adapter
from tiny_dense import save_dense


IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = {"llama": "mixtral", "qwen3": "qwen3_moe", "granite": "granitemoe", "phi3": "mixtral"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def export(place, **options):
    assert export_merged(place / "adapter", place / "out", progress=False, **options)
    model, info = AutoModelForCausalLM.from_pretrained(place / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def difference(model, other):
    return float((logits(model) - logits(other)).abs().max() / logits(other).abs().max())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_kept(tmp_path, family, use_rslora):
    adapted = save_adapter(tmp_path, family, use_rslora=use_rslora)
    exported = export(tmp_path)
    assert exported.config.model_type == FAMILIES[family]
    assert difference(exported, adapted) <= 1e-5
    assert difference(load_with_shared_experts(tmp_path / "dense", **UPCYCLING), adapted) > 0.05
    with adapted.disable_adapter():
        assert difference(exported, adapted) > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": None},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "modules_to_save": None},
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["norm"]},
        {"layers_to_transform": None, "init_lora_weights": "gaussian"},
        {"r": 1},
    ],
)
def test_what_an_adapter_may_hold(tmp_path, options):
    adapted = save_adapter(tmp_path, **options)
    assert difference(export(tmp_path), adapted) <= 1e-5


def test_some_layers_stay_dense(tmp_path):
    adapted = save_adapter(tmp_path, upcycling={"layers": [1]})
    assert difference(export(tmp_path), adapted) <= 1e-5


def test_every_expert_gets_its_own_sum(tmp_path):
    """Worked from PEFT's file: expert e has rows 4 e to 4 e + 3 of A and every third column of B from e on."""
    save_adapter(tmp_path)
    export(tmp_path)
    dense, out = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    gate_up, down = (f"base_model.model.model.layers.1.mlp.experts{one}" for one in (".base_layer", ""))
    for matrix, module, rows in (
        ("gate_proj", gate_up, slice(0, 64)),
        ("up_proj", gate_up, slice(64, 128)),
        ("down_proj", down, slice(0, 32)),
    ):
        for expert in range(3):
            a = adapter[f"{module}.lora_A.weight"][4 * expert : 4 * expert + 4]
            b = adapter[f"{module}.lora_B.weight"][rows, expert::3]
            expected = dense[f"model.layers.1.mlp.{matrix}.weight"] + 12 / 4 * b @ a
            found = out[f"model.layers.1.mlp.experts.{expert}.{matrix}.weight"]
            assert torch.allclose(found, expected, atol=1e-6)
    routers = [adapter[f"base_model.model.model.layers.{layer}.mlp.gate.weight"] for layer in (0, 1)]
    assert all(torch.equal(out[f"model.layers.{layer}.mlp.gate.weight"], routers[layer]) for layer in (0, 1))


def test_names_are_those_that_upcycle_writes(tmp_path):
    save_adapter(tmp_path, "llama")
    export_merged(tmp_path / "adapter", tmp_path / "out", max_shard_bytes=40_000, progress=False)
    upcycle(tmp_path / "dense", tmp_path / "moe", check_tokens=0, progress=False, **UPCYCLING)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert {name for shard in shards for name in load_file(shard)} == load_file(
        tmp_path / "moe/model.safetensors"
    ).keys()
    assert json.loads((tmp_path / "out" / "sparse_hf.json").read_text())["adapter"]["scale"] == 3.0


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_rounded_once(tmp_path, factors):
    save_adapter(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(factors) for name, tensor in load_file(path).items()}, path)
    export(tmp_path)
    adapter, out = load_file(path), load_file(tmp_path / "out" / "model.safetensors")
    module = "base_model.model.model.layers.0.mlp.experts"
    a, b = (adapter[f"{module}.lora_{one}.weight"].float() for one in "AB")
    base = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    expected = (base + 3 * b[:, 2::3] @ a[8:12]).bfloat16()
    found = out["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.99  # the order of a sum decides the rest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".factors-")] == []


def test_another_scale_is_seen(tmp_path):
    adapted = save_adapter(tmp_path)
    change_config(tmp_path, lora_alpha=11)
    assert difference(export(tmp_path), adapted) > 1e-3


def test_an_adapter_of_another_base(tmp_path):
    save_adapter(tmp_path)
    save_dense(tmp_path / "tuned", "qwen3", seed=1)
    with pytest.raises(ValueError, match=r"was trained on `.*dense` as it was then, got `.*tuned`"):
        export_merged(tmp_path / "adapter", tmp_path / "out", source=tmp_path / "tuned", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="dense"):
        export(tmp_path)
    export(tmp_path, source=tmp_path / "moved")


def test_a_fingerprint_is_of_the_numbers_not_of_the_files(tmp_path):
    model = save_dense(tmp_path / "one", "qwen3")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "shards")
    save_dense(tmp_path / "other", "qwen3", seed=1)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")


def test_an_export_goes_on_after_a_kill(tmp_path):
    save_adapter(tmp_path)
    export_merged(tmp_path / "adapter", tmp_path / "whole", max_shard_bytes=40_000, progress=False)
    export_merged(tmp_path / "adapter", tmp_path / "out", max_shard_bytes=40_000, progress=False)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    for path in (lost, tmp_path / "out" / "config.json"):
        os.remove(path)
    export_merged(tmp_path / "adapter", tmp_path / "out", max_shard_bytes=40_000, progress=False)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
