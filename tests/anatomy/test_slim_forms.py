"""When is a cut model of the stock class, and what cannot be cut?"""

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertModel

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from tiny_models import tiny_inputs, tiny_model
from tiny_slim import GROUPED, OPT_TABLE, VARIANTS, even_masks, ragged_masks, tiny_variant


KEY = "encoder.layer.0.heads"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "vit"])
@pytest.mark.parametrize("tied_down", [True, False])
@torch.no_grad()
def test_even_cuts_are_stock_models(family, tied_down, tmp_path):
    model = tiny_model(family, **({} if family == "vit" else GROUPED))
    smaller = cut_units(model, even_masks(model, heads=2, neurons=24), uniform=tied_down)
    assert type(smaller) is type(model)
    assert type(smaller.config) is type(model.config)
    config = smaller.config
    assert (config.num_attention_heads, config.intermediate_size) == ((2, 24) if family == "vit" else (4, 24))
    assert getattr(config, "num_key_value_heads", 2) == 2
    assert config.head_dim == (8 if family == "vit" else 4)
    assert not hasattr(config, "slim")
    inputs = tiny_inputs(model)
    output = smaller(**inputs)[0]
    for unit in find_units(model):  # the same cut, by zeros
        kept = even_masks(model, heads=2, neurons=24)[unit.key].repeat_interleave(unit.width)
        model.get_submodule(unit.output).weight[:, ~kept] = 0
    torch.testing.assert_close(output, model(**inputs)[0], rtol=0, atol=1e-6)
    smaller.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_slim.py").exists()
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs)[0], output)


@pytest.mark.parametrize("variant", ["bert", "roberta", "distilbert", "gpt2"])
def test_families_that_cannot_say_heads_are_stock_if_only_neurons_are_cut(variant):
    model = tiny_variant(variant)
    assert type(cut_units(model, even_masks(model, heads=4, neurons=24), uniform=True)) is type(model)
    with pytest.raises(ValueError, match=f"`uniform=True` .* a {variant} config cannot say that heads are missing"):
        cut_units(model, even_masks(model, heads=2, neurons=24), uniform=True)


def test_uniform_is_refused_for_layers_that_differ():
    model = tiny_variant("llama")
    with pytest.raises(ValueError, match=r"the layers keep different numbers of heads \(\[1, 3\]\)"):
        cut_units(model, ragged_masks(model), uniform=True)
    masks = even_masks(model, heads=2, neurons=24)
    masks["layers.1.neurons"][:] = True
    with pytest.raises(ValueError, match=r"different numbers of neurons \(\[24, 64\]\)"):
        cut_units(model, masks, uniform=True)
    assert type(cut_units(model, masks)).__name__ == "SlimLlamaForCausalLM"


def test_the_decoder_of_t5_keeps_the_encoder_from_the_stock_form():
    model = tiny_variant("t5")
    with pytest.raises(ValueError, match="a t5 config cannot say that neurons are missing"):
        cut_units(model, even_masks(model, heads=4, neurons=24), uniform=True)


def test_counts_that_the_stock_config_refuses_are_said_by_the_slim_form():
    model = tiny_model("llama", **GROUPED)
    masks = even_masks(model, heads=3, neurons=24)  # six query heads do not divide the hidden size of 32
    with pytest.raises(ValueError, match="a llama config refuses them: .*not a multiple of the number of attention"):
        cut_units(model, masks, uniform=True)
    assert type(cut_units(model, masks)).__name__ == "SlimLlamaModel"


def test_a_slim_model_becomes_stock_as_soon_as_it_can():
    model = tiny_model("bert")
    masks = {one.key: torch.ones(one.count, dtype=torch.bool) for one in find_units(model)}
    masks["encoder.layer.0.neurons"][::3] = False
    slim = cut_units(model, masks)
    assert type(slim).__name__ == "SlimBertModel"
    even = cut_units(slim, even_masks(slim, heads=4, neurons=30), uniform=True)
    assert type(even) is BertModel
    assert even.config.intermediate_size == 30


def test_ragged_heads_become_stock_as_soon_as_they_are_even():
    model = tiny_variant("llama")
    slim = cut_units(model, ragged_masks(model))
    even = cut_units(
        slim, {one.key: torch.arange(one.count) < (1 if one.kind == "heads" else 8) for one in find_units(slim)}
    )
    assert type(even) is type(model)
    assert (even.config.num_attention_heads, even.config.num_key_value_heads, even.config.head_dim) == (2, 1, 4)
    assert not {"slim", "auto_map"} & set(even.config.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks.pop(KEY), f"lacks `{KEY}`"),
        (lambda masks: masks.update({"encoder.layer.9.heads": masks[KEY]}), "no place for `encoder.layer.9.heads`"),
        (lambda masks: masks.update({KEY: masks[KEY][:3]}), rf"`{KEY}` must be 4 bools, got \(3,\)"),
        (lambda masks: masks.update({KEY: masks[KEY][None]}), rf"`{KEY}` must be 4 bools, got \(1, 4\)"),
        (lambda masks: masks.update({KEY: masks[KEY].float()}), rf"`{KEY}` must be 4 bools, got .* torch.float32"),
        (lambda masks: masks.update({KEY: torch.zeros(4, dtype=torch.bool)}), f"At least one unit of `{KEY}`"),
        (lambda masks: masks.clear(), "lacks `encoder"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    model = tiny_model("bert")
    masks = ragged_masks(model)
    change(masks)
    with pytest.raises(ValueError, match=message):
        cut_units(model, masks)


def test_only_pretrained_models_are_cut():
    with pytest.raises(TypeError, match="`PreTrainedModel`, got Linear"):
        cut_units(nn.Linear(2, 2), {})


@pytest.mark.parametrize(
    ("target", "message"),
    [("query", "merge adapters first"), ("word_embeddings", "`embeddings.word_embeddings.weight` is wrapped")],
)
def test_adapters_are_to_be_merged_first(target, message):
    peft = pytest.importorskip("peft")
    model = tiny_model("bert")
    masks = ragged_masks(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target]))
    with pytest.raises(ValueError, match=message):
        cut_units(adapted, masks)
    assert type(cut_units(adapted.merge_and_unload(), masks)).__name__ == "SlimBertModel"


def test_a_users_class_is_not_taken_for_the_stock_one_of_its_name():
    smaller = cut_units(stock := tiny_model("bert"), ragged_masks(stock))
    own_class = type("BertModel", (BertModel,), {})
    own = cut_units(model := own_class(stock.config), ragged_masks(model))
    assert isinstance(own, own_class)
    assert not isinstance(smaller, own_class)


def test_a_wrapped_model_is_cut_without_its_wrapper():
    model = tiny_model("bert")
    smaller = cut_units(nn.DataParallel(model), ragged_masks(model))
    assert type(smaller).__name__ == "SlimBertModel"


def test_a_family_by_table_loads_where_its_code_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model("opt")
    smaller = cut_units(model, ragged_masks(model, OPT_TABLE), OPT_TABLE)
    smaller.save_pretrained(tmp_path / "opt")
    loaded = AutoModel.from_pretrained(tmp_path / "opt", trust_remote_code=True)
    assert torch.equal(loaded(**tiny_inputs(model))[0], smaller(**tiny_inputs(model))[0])


# `AutoModel` of an encoder of T5 alone is a model with a decoder.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("t5-encoder")])
def test_a_folder_with_a_head_gives_the_base_model_too(variant, tmp_path):
    model = tiny_variant(variant)
    slim = cut_units(model, ragged_masks(model))
    slim.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    theirs = dict(slim.named_parameters())
    prefix = f"{slim.base_model_prefix}." if hasattr(slim, slim.base_model_prefix) else ""
    for name, parameter in base.named_parameters():
        assert "pooler" in name or torch.equal(parameter, theirs[f"{prefix}{name}"]), name
