"""Does a folder of a slim model load as it was saved, and never otherwise?"""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from sparse_hf.anatomy import modeling_slim
from sparse_hf.anatomy.slim import cut_units
from tiny_models import HEADS, tiny_inputs, tiny_model
from tiny_slim import VARIANTS, ragged_masks, tiny_variant


def cut_variant(variant):
    """A slim model and inputs for it."""
    model = tiny_variant(variant)
    return cut_units(model, ragged_masks(model)), tiny_inputs(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a slim BERT classifier, to read only."""
    folder = tmp_path_factory.mktemp("slim") / "bert"
    cut_variant("bert")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`, to spoil."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_round_trip_is_bitwise(variant, tmp_path):
    smaller, inputs = cut_variant(variant)
    smaller.save_pretrained(tmp_path)
    head = VARIANTS[variant][1]
    loaded = getattr(transformers, HEADS.get(head, "AutoModelForTextEncoding")).from_pretrained(tmp_path)
    assert type(loaded) is type(smaller)
    assert loaded.config.slim == smaller.config.slim
    state = smaller.state_dict()
    assert list(state) == list(loaded.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(**inputs)[0], smaller(**inputs)[0])
    tied = loaded.get_output_embeddings() is not None and loaded.config.tie_word_embeddings
    assert not tied or loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("variant", ["bert", "t5-encoder"])
@torch.no_grad()
def test_copies(variant, copied):
    smaller, inputs = cut_variant(variant)
    twin = copied(smaller)
    assert type(twin) is type(smaller)
    assert torch.equal(twin(**inputs)[0], smaller(**inputs)[0])
    assert twin.config.slim == smaller.config.slim
    next(twin.parameters()).add_(1)
    assert not torch.equal(next(twin.parameters()), next(smaller.parameters()))


def test_dtype_and_attention_are_chosen_as_in_stock_models(saved):
    loaded = AutoModel.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    loaded.set_attn_implementation("sdpa")
    assert loaded.config._attn_implementation == "sdpa"


def test_a_bare_model_loads_under_a_new_head(tmp_path):
    model = tiny_model("bert")
    cut_units(model, ragged_masks(model)).save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    inputs = tiny_inputs(model)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.bert(**inputs)[0], bare(**inputs)[0])


def test_a_head_is_left_off(saved):
    bare = AutoModel.from_pretrained(saved)
    whole = AutoModelForSequenceClassification.from_pretrained(saved)
    assert type(bare).__name__ == "SlimBertModel"
    assert all(torch.equal(tensor, whole.bert.state_dict()[name]) for name, tensor in bare.state_dict().items())


def test_the_config_says_the_counts_and_where_the_code_is(saved):
    config = AutoConfig.from_pretrained(saved)
    assert config.slim["kept"] == {
        "encoder.layer.0.heads": 1,
        "encoder.layer.0.neurons": 16,
        "encoder.layer.1.heads": 3,
        "encoder.layer.1.neurons": 48,
    }
    assert config.auto_map["AutoConfig"] == "modeling_slim.SlimBertConfig"
    assert config.auto_map["AutoModelForMaskedLM"] == "modeling_slim.SlimBertForMaskedLM"
    assert (saved / "modeling_slim.py").read_bytes() == Path(modeling_slim.__file__).read_bytes()


def test_the_stock_class_does_not_take_a_slim_folder(saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(saved)


def test_the_module_makes_slim_classes_only():
    assert modeling_slim.SlimBertModel is modeling_slim.SlimBertModel
    assert issubclass(modeling_slim.SlimViTForImageClassification, transformers.ViTForImageClassification)
    for name in ("SlimBertTokenizer", "SlimNothing", "BertModel", "Slim"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_slim, name)


LOST = "encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize("load", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
@pytest.mark.parametrize("lost", [LOST, "encoder.layer.0.attention.self.key.bias"])
def test_a_lost_tensor_is_never_made_up(folder, lost, load, options):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"bert.{lost}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{lost}` .* is missing"):
        load.from_pretrained(folder, **options)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
@pytest.mark.parametrize("load", [AutoModel, AutoModelForSequenceClassification])
def test_a_tensor_of_another_shape_is_never_made_up(folder, load, options):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"bert.{LOST}"] = tensors[f"bert.{LOST}"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError if options else RuntimeError, match=f"{LOST}` .*" if options else "mismatched"):
        load.from_pretrained(folder, **options)


@pytest.mark.parametrize("key", ["encoder.layer.0.heads", "encoder.layer.1.neurons"])
def test_counts_that_disagree_with_the_tensors_are_refused(folder, key):
    config = json.loads((folder / "config.json").read_text())
    config["slim"]["kept"][key] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="The checkpoint must hold every weight of the base model"):
        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_lost_position_bias_of_t5_is_never_made_up(tmp_path):
    cut_variant("t5")[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="relative_attention_bias"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
