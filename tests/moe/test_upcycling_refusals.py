"""What cannot be upcycled is refused before a byte is written, with the reason."""

import json

import pytest
import transformers

from sparse_hf.moe.pairs import PAIRS, pair_of
from sparse_hf.moe.upcycle import upcycle
from tiny_models import tiny_config, tiny_model


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama", "causal_lm").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mlp_bias": True}, "`mlp_bias` is False, got True: the target's experts have no biases"),
        ({"attention_bias": True}, "`attention_bias` is False, got True"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'silu', got 'gelu'"),
    ],
)
def test_features_of_a_llama(changes, match):
    with pytest.raises(ValueError, match=match):
        pair_of(tiny_config("llama", **changes))


def test_windows_of_a_qwen3():
    with pytest.raises(ValueError, match="`use_sliding_window` is False, got True"):
        pair_of(tiny_config("qwen3", use_sliding_window=True))


@pytest.mark.parametrize(
    ("config", "target", "match"),
    [
        (transformers.SmolLM3Config(), None, r"`no_rope_layers` is 1, got \[1, 1, 1, 0, .*no rotary positions"),
        (transformers.Ministral3Config(), None, r"`rope_parameters.llama_4_scaling_beta` is 0.0, got 0.1.*queries"),
        (transformers.Qwen2Config(use_sliding_window=True), None, "`use_sliding_window` is False, got True"),
        (transformers.MistralConfig(), "glm4_moe", "`sliding_window` is None, got 4096: the target attends to every"),
        (transformers.Qwen3Config(attention_bias=True), "glm4_moe", "`attention_bias` is False, got True"),
        (transformers.GraniteConfig(mlp_bias=True), None, "`mlp_bias` is False, got True"),
        (transformers.Ernie4_5Config(use_bias=True), None, "`use_bias` is False, got True"),
        (transformers.Phi3Config(partial_rotary_factor=0.75), None, "partial_rotary_factor` is None, got 0.75"),
        (transformers.Phi3Config(resid_pdrop=0.1), None, "`resid_pdrop` is 0.0, got 0.1"),
        (tiny_config("llama"), "qwen3_moe", "must be one of mixtral, glm4_moe, got 'qwen3_moe'"),
        (transformers.Olmo2Config(), "olmoe", "got 'olmoe': OLMo2 normalises after"),
        (tiny_config("phi3"), "phimoe", "got 'phimoe': Phi-3 uses RMSNorm and PhiMoE LayerNorm"),
    ],
)
def test_features_of_other_families(config, target, match):
    with pytest.raises(ValueError, match=match):
        pair_of(config, target)


@pytest.mark.parametrize(("family", "match"), [("gemma", "'gemma'"), ("t5", "drop tokens"), ("gpt2", "'gpt2'")])
def test_families_without_an_exact_pair(family, match):
    with pytest.raises(ValueError, match=match) as caught:
        pair_of(tiny_config(family))
    assert all(name in str(caught.value) for name in PAIRS)


def test_a_quantised_source():
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="dequantise"):
        pair_of(config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"experts": 1}, "`experts` must be 2 or more, got 1"),
        ({"experts": 4, "top_k": 5}, "`top_k` must be between 1 and the 4 experts, got 5"),
        ({"top_k": 0}, "`top_k` must be between 1"),
        ({"router_std": -1.0}, "`router_std` must be 0 or more"),
        ({"layers": [0]}, "a mixture in every layer"),
        ({"layers": [2]}, "the layers 0 to 1"),
        ({"layers": []}, "the layers 0 to 1"),
    ],
)
def test_numbers(dense, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        upcycle(dense, tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


def test_places(dense, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub repository"):
        upcycle(tmp_path / "nothing" / "here", tmp_path / "moe")
    with pytest.raises(ValueError, match="another folder than the source"):
        upcycle(dense, dense)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files \(notes.txt\)"):
        upcycle(dense, tmp_path / "full")
    upcycle(dense, tmp_path / "moe", check_tokens=0, progress=False)
    with pytest.raises(FileExistsError, match="holds a model already"):
        upcycle(dense, tmp_path / "moe", progress=False)


def test_another_plan_into_a_half_written_folder(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", check_tokens=0, progress=False)
    (tmp_path / "moe" / "config.json").unlink()
    with pytest.raises(ValueError, match="plan"):
        upcycle(dense, tmp_path / "moe", experts=4, check_tokens=0, progress=False)
    upcycle(dense, tmp_path / "moe", check_tokens=0, progress=False)  # the same plan goes on
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_local_experts"] == 8


def test_another_source_of_the_same_shape_into_a_half_written_folder(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", check_tokens=0, progress=False)
    (tmp_path / "moe" / "config.json").unlink()
    tiny_model("llama", "causal_lm", seed=1).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="another plan: other sources"):
        upcycle(tmp_path / "tuned", tmp_path / "moe", check_tokens=0, progress=False)


def test_every_target_exists():
    for source, pairs in PAIRS.items():
        assert len({pair.target.model_type for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert pair.source == source
            assert hasattr(transformers, pair.target.architecture)
