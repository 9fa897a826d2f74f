"""A model cut to a ticket, saved, and read back by sparse_hf's own code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

from sparse_hf import load_slim, slim
from sparse_hf.anatomy.units import find_units
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.structured_ticket import StructuredTicket
from tiny_models import tiny_inputs, tiny_model
from tiny_slim import OPT_TABLE, VARIANTS, even_masks, ragged_masks, tiny_variant


def assert_same_model(loaded, saved, inputs=None):
    assert type(loaded) is type(saved)
    state = saved.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    inputs = inputs or tiny_inputs(saved)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], saved(**inputs)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A slim BERT classifier with different counts per layer, and its folder, to read only."""
    model, folder = tiny_variant("bert"), tmp_path_factory.mktemp("slim")
    smaller = slim(model, StructuredTicket(ragged_masks(model)))
    smaller.save_pretrained(folder)
    return smaller, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, to spoil."""
    for file in saved[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("variant", VARIANTS)
def test_slim_then_load(variant, tmp_path):
    model = tiny_variant(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticket = StructuredTicket(ragged_masks(model))
    smaller = slim(model, ticket)
    assert {one.key: one.count for one in find_units(smaller)} == ticket.counts()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    smaller.save_pretrained(tmp_path)
    assert_same_model(load_slim(tmp_path), smaller, tiny_inputs(model))


def test_a_ticket_drawn_from_a_model_fits_it():
    model = tiny_variant("bert")
    ticket = StructuredTicket.from_model(model, EarlyBirdConfig(heads=0.5, neurons=0.5))
    assert {one.key: one.count for one in find_units(slim(model, ticket.shuffled(3)))} == ticket.counts()


def test_a_ticket_fits_the_same_encoder_under_another_head():
    ticket = StructuredTicket(ragged_masks(tiny_model("bert")))
    smaller = slim(tiny_model("bert", "token_classification"), ticket)
    assert {one.key: one.count for one in find_units(smaller)} == ticket.counts()


def test_equal_counts_make_a_stock_model_where_the_config_can_say_so(tmp_path):
    model = tiny_variant("llama")
    smaller = slim(model, StructuredTicket(even_masks(model, heads=2, neurons=48)), uniform=True)
    assert type(smaller) is LlamaForCausalLM
    assert (smaller.config.num_key_value_heads, smaller.config.intermediate_size) == (2, 48)
    smaller.save_pretrained(tmp_path)
    assert_same_model(load_slim(str(tmp_path)), smaller)
    assert_same_model(LlamaForCausalLM.from_pretrained(tmp_path), smaller)


def test_uniform_refuses_what_the_stock_config_cannot_say():
    model = tiny_variant("bert")
    with pytest.raises(ValueError, match="`uniform=True` needs a form .* a bert config cannot say that heads"):
        slim(model, StructuredTicket(even_masks(model, heads=2, neurons=48)), uniform=True)
    with pytest.raises(ValueError, match="different numbers of heads"):
        slim(model, StructuredTicket(ragged_masks(model)), uniform=True)


def test_a_ticket_of_another_model_is_refused():
    ticket = StructuredTicket(ragged_masks(tiny_variant("bert")))
    with pytest.raises(ValueError, match="masks of another model: it"):
        slim(tiny_variant("gpt2"), ticket)
    with pytest.raises(ValueError, match=r"`encoder.layer.0.heads` must be 2 bools, got \(4,\)"):
        slim(tiny_model("bert", num_attention_heads=2), ticket)
    with pytest.raises(TypeError, match="`PreTrainedModel`, got Linear"):
        slim(nn.Linear(2, 2), ticket)


def test_a_family_outside_the_tables_with_a_table(tmp_path):
    model = tiny_model("opt", "causal_lm")
    ticket = StructuredTicket(ragged_masks(model, OPT_TABLE))
    with pytest.raises(ValueError, match="Heads and neurons are known for"):
        slim(model, ticket)
    smaller = slim(model, ticket, unit_table=OPT_TABLE)
    smaller.save_pretrained(tmp_path)
    loaded = load_slim(tmp_path)
    assert_same_model(loaded, smaller)
    assert {one.key: one.count for one in find_units(loaded)} == ticket.counts()  # its table came with it


def test_arguments_of_from_pretrained(saved):
    loaded, info = load_slim(saved[1], dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True)
    assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")
    assert not info["missing_keys"]


def change_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


NAMES = [
    None,
    [],
    {},
    5,
    "SlimBertModel",
    [None],
    [5],
    [["BertModel"]],
    [""],
    ["os"],
    ["BertTokenizer"],
    ["AutoModel"],
]
NAMES += [["SlimBertTokenizer"], ["Slim"], ["SlimNothing"], ["SlimPreTrainedModel"], ["__builtins__"], ["x" * 100_000]]


@pytest.mark.parametrize("architectures", NAMES, ids=lambda value: repr(value)[:30])
def test_what_names_no_model_class_is_refused(folder, architectures):
    change_config(folder, architectures=architectures)
    with pytest.raises(ValueError, match="must name a model class in `architectures`, got") as caught:
        load_slim(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not valid JSON"),
        ("[1, 2]", "must hold a JSON object, got a list"),
        ('{"architectures": ["SlimBertModel"', "is not valid JSON"),
        ('{"a": ' * 60 + "1" + "}" * 60, "nested more than 50 levels"),
        ('{"hidden_size": NaN}', "NaN is no JSON value"),
        (" " * (5 << 20), "must be at most 4194304 bytes"),
    ],
)
def test_a_config_that_is_no_config_is_refused(folder, text, reason):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_slim(folder)


def test_a_missing_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json` does not exist"):
        load_slim(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub repository"):
        load_slim(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "mismatched"),
        ({"architectures": ["SlimGPT2LMHeadModel"]}, "GPT2Model"),
        ({"architectures": ["PreTrainedModel"]}, "PreTrainedModel"),
        ({"slim": None}, "must have `slim` of format 1"),
        ({"num_hidden_layers": 1}, "must keep between 1 and all units of each layer"),
    ],
)
def test_a_config_of_another_model_never_loads(folder, entries, reason):
    change_config(folder, **entries)
    with pytest.raises((ValueError, RuntimeError), match=reason):
        load_slim(folder)


def test_lost_layers_are_never_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`{lost}` .* is missing"):
        load_slim(folder)


def test_a_stock_folder_loads_too(tmp_path):
    model = tiny_variant("bert")
    model.save_pretrained(tmp_path)
    assert type(load_slim(tmp_path)) is BertForSequenceClassification
