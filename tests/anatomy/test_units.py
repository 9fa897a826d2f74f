"""How many heads and neurons are there, and which layer reads them?"""

import dataclasses

import pytest
import torch
from torch import nn

from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.unit_families import UNIT_TABLES
from sparse_hf.anatomy.units import Units, find_units, table_of
from tiny_models import tiny_inputs, tiny_model
from tiny_slim import GROUPED, OPT_TABLE, VARIANTS, ragged_masks, tiny_variant


ATTENTION, MLP = "attention.output.dense", "output.dense"
# family -> prefix under its head in VARIANTS, path of the layers, heads and their width, neurons, what reads each.
EXPECTED = {
    "bert": ("bert.", "encoder.layer", (4, 8, ATTENTION), (64, 1, MLP)),
    "roberta": ("roberta.", "encoder.layer", (4, 8, ATTENTION), (64, 1, MLP)),
    "distilbert": ("distilbert.", "transformer.layer", (4, 8, "attention.out_lin"), (64, 1, "ffn.lin2")),
    "vit": ("vit.", "layers", (4, 8, "attention.o_proj"), (64, 1, "mlp.fc2")),
    "gpt2": ("transformer.", "h", (4, 8, "attn.c_proj"), (128, 1, "mlp.c_proj")),
    # Four groups of two query heads of width 4.
    "llama": ("model.", "layers", (4, 8, "self_attn.o_proj"), (64, 1, "mlp.down_proj")),
    "mistral": ("model.", "layers", (4, 8, "self_attn.o_proj"), (64, 1, "mlp.down_proj")),
    "qwen2": ("model.", "layers", (4, 8, "self_attn.o_proj"), (64, 1, "mlp.down_proj")),
    "qwen3": ("model.", "layers", (4, 8, "self_attn.o_proj"), (64, 1, "mlp.down_proj")),
    "t5": ("", "encoder.block", (4, 8, "layer.0.SelfAttention.o"), (64, 1, "layer.1.DenseReluDense.wo")),
}


def test_every_family_with_a_table_is_tested():
    assert set(EXPECTED) == set(UNIT_TABLES) == {family for family, _, _ in VARIANTS.values()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_units_of_every_family_in_model_order(variant):
    prefix, layers, *both = EXPECTED[VARIANTS[variant][0]]
    wanted = [
        Units(f"{layers}.{number}.{kind}", count, width, f"{prefix}{layers}.{number}.{output}")
        for number in (0, 1)
        for kind, (count, width, output) in zip(("heads", "neurons"), both, strict=True)
    ]
    found = find_units(tiny_variant(variant))
    assert found == wanted
    assert [one.kind for one in found] == ["heads", "neurons", "heads", "neurons"]


@pytest.mark.parametrize("family", sorted(set(UNIT_TABLES) - {"t5"}))
def test_keys_do_not_depend_on_the_head(family):
    bare = {one.key: (one.count, one.width) for one in find_units(tiny_model(family))}
    head = "image_classification" if family == "vit" else "sequence_classification"
    assert {one.key: (one.count, one.width) for one in find_units(tiny_model(family, head))} == bare


def test_a_head_of_grouped_query_attention_is_a_whole_group():
    model = tiny_model("llama", **GROUPED)
    heads = find_units(model)[0]
    attention = model.layers[0].self_attn
    assert heads.count == attention.k_proj.out_features // attention.head_dim == 4
    assert heads.width == 2 * attention.head_dim
    assert find_units(tiny_model("llama", **{**GROUPED, "num_key_value_heads": 1}))[0].count == 1
    assert find_units(tiny_model("llama", **{**GROUPED, "num_key_value_heads": 8}))[0].width == 4


def test_neurons_may_be_wider_than_usual():
    assert find_units(tiny_model("gpt2", n_inner=48))[1].count == 48


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_wrappers_do_not_show(wrap):
    model = tiny_variant("bert")
    assert find_units(wrap(model)) == find_units(model)
    assert table_of(wrap(model)) == UNIT_TABLES["bert"][0]


def test_an_adapter_beside_the_units_does_not_show():
    peft = pytest.importorskip("peft")
    model = tiny_variant("bert")
    plain = find_units(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))
    assert find_units(adapted) == plain


def test_unknown_family_names_the_known_ones_and_the_way_to_add_one():
    with pytest.raises(ValueError, match="'opt'") as caught:
        find_units(tiny_model("opt"))
    message = str(caught.value)
    assert all(family in message for family in UNIT_TABLES)
    assert "UnitTable(" in message
    required = [entry for entry in dataclasses.fields(UnitTable) if entry.default is dataclasses.MISSING]
    required = [entry.name for entry in required if entry.default_factory is dataclasses.MISSING]
    assert all(f"{name}=" in message for name in required)


def test_a_plain_module_is_an_unknown_family():
    with pytest.raises(ValueError, match="None \\(Linear\\)"):
        find_units(nn.Linear(2, 2))


def test_a_deviating_model_of_a_known_family_is_unknown():
    model = tiny_model("bert")
    model.encoder.layer[0].intermediate.up = model.encoder.layer[0].intermediate.dense
    del model.encoder.layer[0].intermediate.dense
    with pytest.raises(ValueError, match="BertModel"):
        find_units(model)


def test_a_table_is_all_that_another_family_needs():
    model = tiny_model("opt", "causal_lm")
    units = find_units(model, OPT_TABLE)
    assert units[0] == Units("decoder.layers.0.heads", 4, 8, "model.decoder.layers.0.self_attn.out_proj")
    assert units[3] == Units("decoder.layers.1.neurons", 64, 1, "model.decoder.layers.1.fc2")
    masks = ragged_masks(model, OPT_TABLE)
    smaller = cut_units(model, masks, OPT_TABLE)
    inputs = tiny_inputs(model)
    for unit in units:
        with torch.no_grad():
            model.get_submodule(unit.output).weight[:, ~masks[unit.key].repeat_interleave(unit.width)] = 0
    torch.testing.assert_close(smaller(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-6)


def test_gemma_is_cut_by_the_table_of_llama():
    model, table = tiny_model("gemma", **GROUPED), UNIT_TABLES["llama"][0]
    assert find_units(model, table) == find_units(tiny_model("llama", **GROUPED))
    assert [one.count for one in find_units(cut_units(model, ragged_masks(model, table), table))] == [1, 16, 3, 48]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers="decoder.stages"), "`OPTModel` has no `decoder.stages`"),
        (dict(layers="decoder.embed_tokens"), "must be the list of layers, got Embedding"),
        (dict(neuron_output="fc3"), "`OPTDecoderLayer` has no `fc3`"),
        (dict(neuron_output="final_layer_norm"), "nn.Linear or Conv1D layers, got torch.nn.*LayerNorm"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        find_units(tiny_model("opt"), dataclasses.replace(OPT_TABLE, **change))


class PackedParameter(nn.Parameter):
    """Stands for the parameters of bitsandbytes and torchao: another class, whatever it holds."""


def test_quantised_layers_are_refused():
    for weight in (
        nn.Parameter(torch.zeros(32, 64, dtype=torch.float8_e4m3fn), requires_grad=False),
        nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False),
        PackedParameter(torch.zeros(32, 64)),
    ):
        model = tiny_model("bert")
        model.encoder.layer[1].output.dense.weight = weight
        with pytest.raises(ValueError, match="Load the model unquantised"):
            find_units(model)
    model.encoder.layer[1].output.dense = nn.Identity()  # GPTQ's layers have no weight at all
    with pytest.raises(ValueError, match="got torch.nn.modules.linear.Identity"):
        find_units(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slim_model_has_its_own_counts(variant):
    model = tiny_variant(variant)
    masks = ragged_masks(model)
    smaller = cut_units(model, masks)
    found = find_units(smaller)
    assert {one.key: one.count for one in found} == {key: int(mask.sum()) for key, mask in masks.items()}
    assert [(one.width, one.output) for one in found] == [(one.width, one.output) for one in find_units(model)]
    assert table_of(smaller) == table_of(model)
    twice = cut_units(smaller, {one.key: torch.arange(one.count) == 0 for one in found})
    assert {one.count for one in find_units(twice)} == {1}
