"""Adapters that are not known to be W + scaling B A, or not of this base, are refused before a byte is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_hf.moe.export_lora import export_merged
from tiny_adapter import change_config, save_adapter


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"use_dora": True}, "`use_dora` in .* must be off"),
        ({"alpha_pattern": {"experts": 3}}, "`alpha_pattern` in .* must be off"),
        ({"rank_pattern": {"experts": 3}}, "`rank_pattern`"),
        ({"bias": "all"}, "`bias`"),
        ({"a_new_option": [1]}, "`a_new_option`"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"peft_type": "IA3"}, "must be of a LoRA adapter, got 'IA3'"),
        ({"auto_mapping": None}, "must say how the base was upcycled"),
        ({"r": 2}, "of rank 2, must fit"),
        ({"r": 0}, "must be numbers, got 0"),
    ],
)
def test_what_is_not_known(tmp_path, entries, match):
    save_adapter(tmp_path)
    change_config(tmp_path, **entries)
    with pytest.raises(ValueError, match=match):
        export_merged(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


SIZES = {"A": (4, 32), "B": (3, 4)}  # of a router
MODULE = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{MODULE}.lora_A.weight"), "must have both factors, got lora_B alone"),
        (lambda t: t.update({"base_model.model.model.lora_embedding_A": torch.ones(2, 2)}), "lora_embedding_A"),
        (lambda t: t.update({"base_model.model.model.norm.bias": torch.ones(32)}), "'?no such weight"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(3)}),
            r"is \[3\], but the model has \[32",
        ),
        (lambda t: t.update({f"{MODULE}.lora_A.weight": torch.ones(8, 64)}), "must fit one of"),
        (
            lambda t: t.update({f"base_model.model.model.norm.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}),
            "must fit one of none",
        ),
        (
            lambda t: t.update({f"{MODULE[:-7]}gate.lora_{one}.weight": torch.ones(x) for one, x in SIZES.items()}),
            "whole or by low rank",
        ),
    ],
)
def test_tensors_that_have_no_place(tmp_path, change, match):
    save_adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=match):
        export_merged(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_number_of_experts(tmp_path):
    save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["auto_mapping"]["sparse_hf"]["experts"] = 4
    change_config(tmp_path, **config)
    with pytest.raises(ValueError, match="it is of another base"):
        export_merged(tmp_path / "adapter", tmp_path / "out", progress=False)


def test_a_router_of_low_rank_is_not_copied_from_the_base(tmp_path):
    save_adapter(tmp_path, target_parameters=["mlp.gate.weight"], modules_to_save=None)
    with pytest.raises(ValueError, match="`model.layers.0.mlp.gate.weight` is no matrix that is copied"):
        export_merged(tmp_path / "adapter", tmp_path / "out", progress=False)


def test_tied_embeddings_that_were_trained(tmp_path):
    save_adapter(tmp_path, "llama", modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="`model.embed_tokens.weight` is tied to another weight"):
        export_merged(tmp_path / "adapter", tmp_path / "out", progress=False)
