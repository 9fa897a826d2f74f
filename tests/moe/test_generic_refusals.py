"""What a generic mixture of experts is not made of, and what does not load as one."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sparse_hf.moe import modeling_mixture
from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.generic_families import STORED_FEED_FORWARDS
from sparse_hf.moe.generic_plan import generic_config, generic_pair, generic_tensors
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.router_init import Router
from sparse_hf.storage.tensor_headers import read_headers
from tiny_mixtures import convert, tiny_dense
from tiny_models import tiny_config, tiny_model


def save(folder, variant="bert"):
    tiny_dense(variant).save_pretrained(folder)
    return folder / "model.safetensors"


def change(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def plan(folder, layers=(0, 1)):
    config = AutoConfig.from_pretrained(folder)
    mixture = Mixture(generic_pair(config).target, experts=4, top_k=2, router=Router(0.5))
    return generic_tensors(read_headers(folder), config, frozenset(layers), mixture)


def test_another_family(tmp_path):
    with pytest.raises(ValueError, match="made of bert, roberta, gpt2, vit, t5, got 'llama'"):
        generic_config(tiny_config("llama"), 4, 2, frozenset([0]))
    with pytest.raises(ValueError, match="got 'llama'"):
        generic_pair(tiny_config("llama"))


def test_a_quantised_model():
    config = tiny_config("bert")
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised"):
        generic_config(config, 4, 2, frozenset([0]))


def test_a_t5_with_a_decoder(tmp_path):
    tiny_model("t5", "seq2seq_lm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoders become mixtures.*`decoder.*save the encoder alone"):
        plan(tmp_path)


@pytest.mark.parametrize("variant", ["bert", "gpt2", "vit", "t5-gated"])
def test_an_ffn_that_is_not_whole(tmp_path, variant):
    path = save(tmp_path, variant)
    table = STORED_FEED_FORWARDS[variant.partition("-")[0]][-1]
    change(path, lambda weights: weights.pop(next(name for name in weights if f"1.{table.down}.weight" in name)))
    with pytest.raises(ValueError, match=rf"1\.{table.down}\.weight` is missing"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bert.encoder.layer.1.output.dense.lora_A.weight", torch.zeros(2), "lora_A.weight`: merge adapters"),
        ("bert.encoder.layer.1.output.dense.bias", torch.zeros(7), "fit together.*output.dense.bias F32 .7."),
        ("bert.encoder.layer.1.output.dense.weight", torch.zeros(32, 64).half(), "of one dtype"),
        ("encoder.layer.1.output.dense.weight", torch.zeros(32, 64), "got both"),
    ],
)
def test_something_else_in_an_ffn(tmp_path, name, value, message):
    path = save(tmp_path)
    change(path, lambda weights: weights.update({name: value}))
    with pytest.raises(ValueError, match=message):
        plan(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path):
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="got neither"):
        plan(tmp_path)


@pytest.mark.parametrize("part", ["router.weight", "experts.up_proj", "experts.down_proj_bias", "weight"])
def test_no_weight_of_a_mixture_is_fresh(tmp_path, part):
    save(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe")
    change(tmp_path / "moe" / "model.safetensors", lambda one: one.pop(f"bert.encoder.layer.1.output.dense.{part}"))
    with pytest.raises(ValueError, match="must hold every weight"):
        AutoModel.from_pretrained(tmp_path / "moe")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": None},
        {"num_experts_per_tok": 5},
        {"num_experts_per_tok": 0},
        {"mixture_layers": None},
        {"mixture_layers": [2]},
        {"mixture_layers": [0, 0]},
        {"mixture_layers": [[0]]},
    ],
)
def test_a_config_that_makes_no_sense(changes):
    config = generic_config(tiny_config("gpt2"), 4, 2, frozenset([0, 1]))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match="The config of a mixture must have"):
        AutoModelForCausalLM.from_config(config)


def test_more_layers_than_the_config_says_do_not_load(tmp_path):
    save(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", layers=(1,))
    path = tmp_path / "moe" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mixture_layers": [0, 1]}))
    with pytest.raises((ValueError, RuntimeError)):
        AutoModel.from_pretrained(tmp_path / "moe")


def test_a_model_made_from_a_config_has_usual_weights():
    config = generic_config(tiny_config("gpt2"), 4, 2, frozenset([1]))
    model = AutoModelForCausalLM.from_config(config)
    experts = model.transformer.h[1].mlp.experts
    assert 0.01 < experts.up_proj.std().item() < 0.03
    assert not experts.up_proj_bias.any()
    assert type(model.transformer.h[0].mlp).__name__ == "GPT2MLP"
    assert json.loads(config.to_json_string())["mixture_layers"] == [1]


def test_t5_mixtures_are_encoders():
    config = generic_config(tiny_config("t5"), 4, 2, frozenset([0]))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSeq2SeqLM.from_config(config)


def test_names_stand_for_one_class_each():
    assert modeling_mixture.MixtureBertModel is modeling_mixture.MixtureBertModel
    assert issubclass(modeling_mixture.MixtureViTModel, transformers.ViTModel)
    assert modeling_mixture.MixtureT5Config.model_type == "sparse_hf_mixture_t5"
    for name in ("MixtureLlamaModel", "MixtureNothing", "Nothing", "MixtureTrainer"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_mixture, name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"untie": True}, "`untie` is for stock mixtures.*leave it out for gpt2"),
        ({"target": "mixtral"}, "`target` of a gpt2 model must be 'sparse_hf_mixture_gpt2', got 'mixtral'"),
        ({"init": ExpertInit(granularity=2)}, "leave `granularity`, `shared_half` and `scale` out"),
        ({"experts": 1, "top_k": 1}, "`experts` must be 2 or more"),
        ({"top_k": 5}, "between 1 and the 4 experts, got 5"),
        ({"layers": "0-2"}, "layers 0 to 1"),
    ],
)
def test_what_a_mixture_of_ours_cannot_be(tmp_path, options, match):
    tiny_dense("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "dense", tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()
