"""DSEE without PEFT, PEFT without sparse_hf, registering twice, quantized bases."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from transformers import AutoModelForCausalLM, TorchAoConfig

from dsee.tiny_dsee import base_model, dsee_config, dsee_model, logits, stir
from sparse_hf.dsee.config import DseeConfig
from sparse_hf.dsee.layer import PREFIX
from sparse_hf.dsee.registration import METHOD, dsee_type, register_dsee


# One process asks both, since it imports much: a PEFT that never heard of us, then a sparse_hf that finds no PEFT.
PROGRAM = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print("KeyError:", error)
for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
    del sys.modules[name]
sys.modules["peft"] = None
import sparse_hf
sparse_hf.StaticSparsityConfig(sparsity=0.5)
try:
    sparse_hf.DseeConfig
except ImportError as error:
    print("ImportError:", error)
"""


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register_dsee()
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert dsee_type() is DseeConfig().peft_type is PeftType("SPARSE_HF_DSEE") is PeftType.SPARSE_HF_DSEE
    # Transformers rebuilds the prefix from the method's name.
    assert PEFT_TYPE_TO_PREFIX_MAPPING[dsee_type()] == PREFIX == f"{METHOD}_" == f"{dsee_type().value.lower()}_"


def test_peft_without_sparse_hf_and_sparse_hf_without_peft(tmp_path):
    dsee_model("bert").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()[-2:]
    assert first == "KeyError: 'SPARSE_HF_DSEE'"
    assert second.startswith("ImportError: `sparse_hf.DseeConfig` needs PEFT (")
    assert second.endswith("run `pip install 'sparse_hf[peft]'`.")


def int8_llama(folder):
    """A tiny Llama quantized by torchao, as users load one."""
    quantization = pytest.importorskip("torchao.quantization")
    base_model("llama").save_pretrained(folder)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def test_a_quantized_base_is_tuned_but_not_masked(tmp_path):
    plain = logits(int8_llama(tmp_path))
    model = get_peft_model(int8_llama(tmp_path), dsee_config("llama", base_sparsity=0.0)).eval()
    torch.testing.assert_close(logits(model), plain)
    adapted = logits(stir(model))
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    read = PeftModel.from_pretrained(int8_llama(tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(read), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    torch.testing.assert_close(logits(model.merge_and_unload()), adapted, atol=0.05, rtol=0.1)
    with pytest.raises(ValueError, match="S1 needs weights that can hold exact zeros, got a base quantized by"):
        get_peft_model(int8_llama(tmp_path), dsee_config("llama"))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bitsandbytes_base(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = base_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            stock = getattr(layer.self_attn, name)
            kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
            options = {} if bits == 4 else {"has_fp16_weights": False, "threshold": 0.0}
            made = kind(stock.in_features, stock.out_features, bias=False, **options)
            made.load_state_dict(stock.state_dict())
            setattr(layer.self_attn, name, made.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4
    plain = logits(model)
    with pytest.raises(ValueError, match="S1 needs weights that can hold exact zeros"):
        get_peft_model(copy.deepcopy(model), dsee_config("llama"))
    adapted = get_peft_model(model, dsee_config("llama", base_sparsity=0.0)).eval()
    torch.testing.assert_close(logits(adapted), plain, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(logits(stir(adapted)), plain, atol=1e-2)
