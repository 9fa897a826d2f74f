"""Adapters on disk: read by PEFT and by Transformers, as large as the arithmetic says, complete."""

import json
import struct

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dsee.tiny_dsee import (
    FAMILY,
    NNZ,
    R,
    adapter_tensors,
    assert_same,
    base_model,
    bits,
    dsee_config,
    dsee_model,
    layers,
    logits,
    stir,
)
from sparse_hf.dsee.config import DseeConfig
from tiny_models import LABELS


AUTO = {"SEQ_CLS": AutoPeftModelForSequenceClassification, "CAUSAL_LM": AutoPeftModelForCausalLM}
TRANSFORMERS = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


def saved(family, tmp_path, **changes):
    """A trained adapter on disk whose base is on disk too; the model and the adapter's folder."""
    base_model(family).save_pretrained(tmp_path / "base")
    base = type(base_model(family)).from_pretrained(tmp_path / "base")
    model = dsee_model(family, base=base, **changes)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@FAMILY
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_reads_it(family, tmp_path, low_cpu_mem_usage):
    model, folder = saved(family, tmp_path)
    read = PeftModel.from_pretrained(base_model(family), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(adapter_tensors(read), adapter_tensors(model))
    assert torch.equal(logits(read.eval()), logits(model))
    assert_same(bits(read), bits(model))
    assert not any(p.requires_grad for p in read.parameters())
    assert_same(dict(read.unload().state_dict()), bits(base_model(family)))


@FAMILY
def test_it_can_be_trained_on_and_saved_again(family, tmp_path):
    model, folder = saved(family, tmp_path)
    read = PeftModel.from_pretrained(base_model(family), folder, is_trainable=True)
    trainable = {name for name, p in read.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    read.save_pretrained(tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again" / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    first, second = (PeftConfig.from_pretrained(one) for one in (folder, tmp_path / "again"))
    assert isinstance(first, DseeConfig)
    assert first.to_dict() | {"inference_mode": None} == second.to_dict() | {"inference_mode": None}


@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM")])
def test_peft_makes_base_and_adapter_from_the_folder(family, task, tmp_path):
    model, folder = saved(family, tmp_path, task_type=task)
    made = AUTO[task].from_pretrained(folder, **({"num_labels": LABELS} if family == "bert" else {}))
    assert torch.equal(logits(made.eval()), logits(model))
    assert_same(adapter_tensors(made), adapter_tensors(model))


def test_peft_makes_a_model_without_a_task_from_the_folder(tmp_path):
    model, folder = saved("gpt2", tmp_path, task_type=None)
    assert torch.equal(logits(AutoPeftModel.from_pretrained(folder).eval()), logits(model))


@FAMILY
def test_transformers_reads_it(family, tmp_path):
    model, folder = saved(family, tmp_path)
    read = TRANSFORMERS[family].from_pretrained(folder).eval()
    assert len(layers(read)) == len(layers(model))
    torch.testing.assert_close(logits(read), logits(model), atol=1e-6, rtol=1e-5)
    assert_same({name: tensor for name, tensor in bits(read).items() if not name.startswith("base")}, bits(model))


@FAMILY
def test_the_methods_of_transformers(family, tmp_path):
    model, folder = saved(family, tmp_path)
    plain = logits(base_model(family))
    own = base_model(family)
    own.load_adapter(folder, adapter_name="first")
    torch.testing.assert_close(logits(own), logits(model), atol=1e-6, rtol=1e-5)
    own.add_adapter(dsee_config(family, other=True, base_sparsity=0.0), adapter_name="second")
    own.set_adapter("second")
    torch.testing.assert_close(logits(own), plain)
    own.set_adapter("first")
    torch.testing.assert_close(logits(own), logits(model), atol=1e-6, rtol=1e-5)
    own.disable_adapters()
    assert torch.equal(logits(own), plain)
    own.enable_adapters()
    own.save_pretrained(tmp_path / "own")
    assert_same(
        load_file(tmp_path / "own" / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    own.delete_adapter(["first", "second"])
    assert torch.equal(logits(own), plain)


@FAMILY
def test_two_adapters_from_two_folders(family, tmp_path):
    model, folder = saved(family, tmp_path)
    other = stir(dsee_model(family, base_sparsity=0.2, support="random"), seed=8)
    other.save_pretrained(tmp_path / "other")
    read = PeftModel.from_pretrained(base_model(family), folder).eval()
    read.load_adapter(str(tmp_path / "other"), adapter_name="other")
    assert torch.equal(logits(read), logits(model))
    read.set_adapter("other")
    assert torch.equal(logits(read), logits(other))


@FAMILY
def test_sizes_are_the_arithmetic_to_the_byte(family, tmp_path):
    model, folder = saved(family, tmp_path)
    expected = 0
    for layer in layers(model).values():
        outputs, inputs = layer.out_features, layer.in_features
        expected += 4 * R * (outputs + inputs) + (4 + 4) * NNZ + -(-outputs * inputs // 8)
    file = (folder / "adapter_model.safetensors").read_bytes()
    (header_length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + header_length])
    assert len(file) == 8 + header_length + expected
    kinds = {name.rsplit(".", 1)[1]: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert kinds == {
        "sparse_hf_dsee_U": "F32",
        "sparse_hf_dsee_V": "F32",
        "sparse_hf_dsee_values": "F32",
        "sparse_hf_dsee_indices": "I32",
        "sparse_hf_dsee_mask": "U8",
    }


@FAMILY
def test_state_dicts_hold_indices_and_masks_and_no_caches(family):
    model = dsee_model(family)
    held = {name.split(".")[-2] for name in model.state_dict() if "sparse_hf_dsee" in name}
    assert held == {f"sparse_hf_dsee_{part}" for part in ("U", "V", "values", "indices", "mask")}
    assert len(get_peft_model_state_dict(model)) == 5 * len(layers(model))
    # Plain `load_state_dict` brings a mask and a support into force.
    other = dsee_model(family, support="random", base_sparsity=0.2, stirred=False)
    logits(other)
    trained = {name: tensor for name, tensor in model.state_dict().items() if "sparse_hf_dsee" in name}
    other.load_state_dict(trained, strict=False)
    assert torch.equal(logits(other), logits(model))


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model, folder = saved("bert", tmp_path, task_type="SEQ_CLS")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(folder)
    read = PeftModel.from_pretrained(base_model("bert"), folder).eval()
    assert torch.equal(logits(read), logits(model))


def test_a_saved_config_is_plain_json(tmp_path):
    _, folder = saved("bert", tmp_path, masked_modules=["dense"], base_sparsity=0.25)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPARSE_HF_DSEE"
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert len(config["base_fingerprint"]) == 64
    masked = PeftModel.from_pretrained(base_model("bert"), folder)
    assert {name.rsplit(".", 1)[1] for name in layers(masked)} == {"query", "value", "dense"}
