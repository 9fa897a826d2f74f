"""What an EarlyBirdConfig says, refuses and survives."""

import dataclasses
import json
import math

import pytest

from sparse_hf.anatomy.unit_families import UNIT_TABLES
from sparse_hf.tickets.config_json import config_from_dict, config_to_dict
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig, steps_of
from tiny_slim import OPT_TABLE


def test_defaults_are_earlybert_s_and_early_bird_tickets():
    config = EarlyBirdConfig()
    assert (config.heads, config.neurons, config.target_speedup) == (1 / 3, 0.4, None)
    assert (config.head_scope, config.neuron_scope, config.neuron_multiple) == ("layer", "global", 16)
    assert (config.l1, config.ranking, config.coefficients) == (1e-4, "signed", "discard")
    assert (config.draw_at, config.history, config.threshold) == (None, 5, 0.1)
    assert config.unit_table is config.coefficient_learning_rate is config.search_learning_rate is None
    assert config.final_training
    assert not config.uniform


def test_one_budget_leaves_the_default_of_the_other():
    assert (EarlyBirdConfig(heads=0.5).heads, EarlyBirdConfig(heads=0.5).neurons) == (0.5, 0.4)
    assert (EarlyBirdConfig(neurons=0).heads, EarlyBirdConfig(neurons=0).neurons) == (1 / 3, 0)


def test_a_target_speedup_leaves_both_budgets_open():
    config = EarlyBirdConfig(target_speedup=2.0)
    assert config.heads is config.neurons is None
    assert (config.speedup_of, config.latency_batch, config.latency_length) == ("training", 8, 128)


def test_uniform_cuts_every_layer_alike():
    config = EarlyBirdConfig(uniform=True, head_scope="global")
    assert config.head_scope == config.neuron_scope == "layer"


@pytest.mark.parametrize(
    "config",
    [
        EarlyBirdConfig(heads=0, neurons=0.55, head_scope="global", neuron_scope="layer", uniform=False),
        EarlyBirdConfig(uniform=True, neuron_multiple=1, ranking="absolute", l1=0),
        EarlyBirdConfig(target_speedup=1.5, speedup_of="inference", latency_batch=1, latency_length=64),
        EarlyBirdConfig(search_learning_rate=2e-5, coefficient_learning_rate=1, final_training=False),
        EarlyBirdConfig(draw_at=7),
        EarlyBirdConfig(check_every=3, earliest=1.0, longest=30),
        EarlyBirdConfig(unit_table=OPT_TABLE),
        *[EarlyBirdConfig(unit_table=table) for table in UNIT_TABLES["t5"]],
    ],
)
def test_json_round_trip(config):
    content = config_to_dict(config)
    read = json.loads(json.dumps(content))
    assert read == content
    assert read["method"] == "early_bird"
    again = config_from_dict(read)
    assert again == config
    assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(config).values()]
    assert dataclasses.replace(config) == config


def test_a_table_may_be_a_dict():
    assert EarlyBirdConfig(unit_table=dataclasses.asdict(OPT_TABLE)).unit_table == OPT_TABLE


@pytest.mark.parametrize(
    ("moment", "steps"),
    [(1, 1), (20, 20), (1.0, 50), (0.2, 10), (0.05, 2), (0.51, 26), (0.001, 1), (2.5, 125)],
)
def test_a_whole_number_is_steps_and_another_epochs(moment, steps):
    assert steps_of(moment, steps_per_epoch=50) == steps
    assert isinstance(steps_of(moment, 50), int)


FRACTIONS = [1, 1.0, -0.1, 2, math.nan, math.inf, True, "0.5"]


@pytest.mark.parametrize("value", FRACTIONS)
@pytest.mark.parametrize("name", ["heads", "neurons", "threshold"])
def test_fractions(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\), got {value!r}. It is a fraction"):
        EarlyBirdConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, math.nan, math.inf, True, "1", [1]])
@pytest.mark.parametrize("name", ["draw_at", "check_every", "earliest", "longest"])
def test_moments(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a number of steps \(20\) or of epochs \(0.2, 1.0\)"):
        EarlyBirdConfig(**{name: value})


@pytest.mark.parametrize("name", ["check_every", "earliest", "longest"])
def test_only_the_draw_may_be_left_open(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of steps .*, got None"):
        EarlyBirdConfig(**{name: None})


WHOLE = "must be a whole number of 1 or more"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *[({"target_speedup": value}, "must be more than 1, got") for value in (1, 1.0, 0.5, -2, math.nan, math.inf)],
        *[({"target_speedup": value}, "`target_speedup` must be more than 1") for value in (True, "2")],
        (
            {"target_speedup": 2, "heads": 0.5},
            "`target_speedup`, or `heads` and `neurons`, not both, got 2, 0.5 and N",
        ),
        ({"target_speedup": 2, "neurons": 0.0}, "`heads` and `neurons`, not both, got 2, None and 0.0"),
        ({"target_speedup": 2, "uniform": True}, "layer by layer, got `uniform=True`. Give `heads` and `neurons`"),
        ({"speedup_of": "both"}, "Unknown speedup_of 'both'. Choose one of: training, inference"),
        ({"head_scope": "model"}, "Unknown head_scope 'model'. Choose one of: layer, global"),
        ({"neuron_scope": None}, "Unknown neuron_scope None. Choose one of: layer, global"),
        ({"ranking": "magnitude"}, "Unknown ranking 'magnitude'. Choose one of: signed, absolute"),
        ({"coefficients": "keep"}, "Unknown coefficients 'keep'. Choose one of: discard, fold"),
        *[({"neuron_multiple": value}, f"`neuron_multiple` {WHOLE}") for value in (0, -16, 16.0, True, None)],
        *[({"latency_batch": value}, f"`latency_batch` {WHOLE}") for value in (0, 1.5, None)],
        *[({"latency_length": value}, f"`latency_length` {WHOLE}") for value in (0, "128", None)],
        *[({"l1": value}, "`l1` must be 0 or more, got") for value in (-1e-4, math.nan, math.inf, True, None, "0")],
        *[({"search_learning_rate": value}, "must be more than 0") for value in (0, -1e-5, math.nan, math.inf, True)],
        *[({"coefficient_learning_rate": value}, "`coefficient_learning_rate` must") for value in (0, "1e-4")],
        *[({"history": value}, "`history` must be a number of masks, 2 or more") for value in (1, 0, 5.0, True, None)],
        ({"threshold": None}, "`threshold` must be in"),
        *[({"unit_table": value}, "A table of units must have the fields") for value in ("bert", 3, [], {"x": 1})],
        ({"unit_table": {"layers": "h"}}, "A table of units must hold module paths and counts"),
    ],
)
def test_refusals(options, reason):
    with pytest.raises(ValueError, match=reason):
        EarlyBirdConfig(**options)


def test_refusals_of_json():
    content = config_to_dict(EarlyBirdConfig())
    with pytest.raises(ValueError, match="EarlyBirdConfig has no field 'sparsity'. Choose from: check_every, coeff"):
        config_from_dict({**content, "sparsity": 0.5})
    hostile = {**dataclasses.asdict(OPT_TABLE), "layers": "decoder.__class__"}
    with pytest.raises(ValueError, match="A table of units must hold module paths"):
        config_from_dict({**content, "unit_table": hostile})


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EarlyBirdConfig().heads = 0.5
