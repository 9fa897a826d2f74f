"""`config.slim` may come from anybody: nothing but counts and paths of modules gets through."""

import pytest
import torch

from sparse_hf.anatomy.modeling_slim import slim_config_class, slim_model_class, table_from_dict
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.unit_families import UNIT_TABLES
from tiny_models import tiny_model
from tiny_slim import ragged_masks


KEY = "encoder.layer.0.heads"
TABLE = "A table of units must"
SLIM = "A slim model's config must have `slim` of format 1"
KEPT = "must keep between 1 and all units of each layer"


def build(change):
    """What a folder with a changed `config.slim` would build before it reads weights."""
    model = tiny_model("bert")
    values = cut_units(model, ragged_masks(model)).config.to_dict()
    change(values)
    values.pop("model_type")
    config = slim_config_class("bert").from_dict(values)
    with torch.device("meta"):
        return slim_model_class(type(model))(config)


def test_an_unchanged_config_builds_the_slim_model():
    model = build(lambda values: None)
    assert model.encoder.layer[0].attention.self.query.out_features == 8
    assert model.encoder.layer[0].attention.self.num_attention_heads == 1
    assert model.encoder.layer[1].intermediate.dense.out_features == 48


@pytest.mark.parametrize("slim", [None, [], [1], "slim", 5, {}, {"format": 2, "kept": {}}, {"format": 1, "kept": []}])
def test_slim_must_be_of_the_format(slim):
    with pytest.raises(ValueError, match=SLIM):
        build(lambda values: values.update(slim=slim))


@pytest.mark.parametrize("count", [0, -1, 5, 10**30, True, "2", 2.0, None, [2], {}])
def test_counts_must_be_of_units_there_are(count):
    with pytest.raises(ValueError, match=KEPT):
        build(lambda values: values["slim"]["kept"].update({KEY: count}))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["slim"]["kept"].pop(KEY),
        lambda values: values["slim"]["kept"].update({"encoder.layer.2.heads": 1}),
        lambda values: values["slim"]["kept"].update({f"encoder.layer.{n}.heads": 1 for n in range(10_000)}),
        lambda values: values.update(num_hidden_layers=1),
        lambda values: values.update(num_hidden_layers=3),
    ],
)
def test_counts_must_be_of_the_layers_there_are(change):
    with pytest.raises(ValueError, match=KEPT) as caught:
        build(change)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", "encoder.__class__", TABLE),
        ("layers", "encoder._modules", TABLE),
        ("layers", "", TABLE),
        ("layers", "encoder..layer", TABLE),
        ("layers", "encoder.layer()", TABLE),
        ("layers", ["encoder"], TABLE),
        ("layers", None, TABLE),
        pytest.param("layers", "x" * 100_000, "has no `x", id="long"),
        ("layers", "nowhere", "`SlimBertModel` has no `nowhere`"),
        ("layers", "pooler.dense", "`pooler.dense` must be the list of layers, got Linear"),
        ("layers", "embeddings", "`embeddings` must be the list of layers, got BertEmbeddings"),
        ("head_output", "attention", "unquantised nn.Linear"),
        ("head_output", "attention.output.LayerNorm", "unquantised nn.Linear"),
        ("head_output", 5, TABLE),
        ("neuron_output", "output", "unquantised nn.Linear"),
        ("neuron_output", "output.__init__", TABLE),
        ("head_projections", {}, TABLE),
        ("head_projections", ["attention.self.query"], TABLE),
        ("head_projections", {"attention.self.query": 0}, TABLE),
        ("head_projections", {"attention.self.query": True}, TABLE),
        ("head_projections", {"attention.self.query": 1.0}, TABLE),
        ("head_projections", {"attention.self.__dict__": 1}, TABLE),
        ("head_projections", {"attention.self.query": 10**30}, "do not divide"),
        ("neuron_projections", {"intermediate.dense": 3}, "which 3 parts of 64 units do not divide"),
        ("head_attributes", [], TABLE),
        ("head_attributes", {"attention.self": 5}, TABLE),
        ("head_attributes", {"attention.self": "num_attention_heads"}, TABLE),
        ("head_attributes", {"attention.self": ["__dict__"]}, TABLE),
        ("head_attributes", {"attention.self": ["_modules"]}, TABLE),
        ("head_attributes", {"attention.self": [5]}, TABLE),
        ("head_attributes", {"attention.__class__": ["num_attention_heads"]}, TABLE),
        ("head_attributes", {"attention.self": ["training"]}, "must have a number `training`, got True"),
        ("head_attributes", {"attention.self": ["forward"]}, "must have a number `forward`"),
        ("head_attributes", {"attention.self": ["nothing"]}, "must have a number `nothing`, got None"),
        ("head_attributes", {"nowhere": ["nothing"]}, "`BertLayer` has no `nowhere`"),
        ("position_bias", 5, TABLE),
        ("position_bias", "__class__", TABLE),
        ("position_bias", "bias", "must be of an nn.Embedding, got NoneType"),
        ("position_bias", "attention.self.query", "must be of an nn.Embedding, got Linear"),
        ("stock_names", ["neurons"], TABLE),
        ("stock_names", {"neurons": 5}, TABLE),
        ("stock_names", {"neurons": "__class__"}, TABLE),
        ("evil", 1, "must have the fields"),
    ],
)
def test_tables_must_be_paths_of_modules_and_counts(field, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(lambda values: values["slim"]["table"].update({field: value}))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("table", [None, [], "bert", {}, {"layers": "encoder.layer"}])
def test_tables_must_be_whole(table):
    with pytest.raises(ValueError, match=TABLE):
        build(lambda values: values["slim"].update(table=table))
    with pytest.raises(ValueError, match=TABLE):
        table_from_dict(table)


@pytest.mark.parametrize("family", UNIT_TABLES)
def test_our_own_tables_are_well_formed(family):
    for table in UNIT_TABLES[family]:
        assert table_from_dict(vars(table)) == table
