"""Configs refuse what makes no sense, in one sentence, and survive JSON."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from sparse_hf.tickets.config_json import METHODS, config_from_dict, config_to_dict
from sparse_hf.tickets.configs import GradualPruningConfig, LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig


CONFIGS = [
    LotteryTicketConfig(),
    LotteryTicketConfig(sparsity=0.488, per_round=0.2, schedule="geometric", include="*.query.weight", seed=3),
    LotteryTicketConfig(rounds=3, round_epochs=0.5, rewind_step=2, final_training=False, exclude=["a", "b"]),
    GradualPruningConfig(initial_sparsity=0.1, start_step=5, end_step=10, exclude=("a",)),
    StaticSparsityConfig(ticket="me/ticket", check_base=False, include="x"),
    StaticSparsityConfig(sparsity=0.5, score="random", budget="erdos_renyi", seed=9),
    EarlyBirdConfig(),
    EarlyBirdConfig(target_speedup=2, draw_at=0.2, coefficients="fold", history=3, coefficient_learning_rate=0.01),
]

CHANGES = {kind: {"l1": 0.5} if kind is EarlyBirdConfig else {"seed": 77} for kind in METHODS.values()}


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_field_has_help(kind):
    for entry in dataclasses.fields(kind):
        assert entry.metadata["help"].endswith("."), entry.name


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    content = config_to_dict(config)
    read = json.loads(json.dumps(content))
    assert read == content  # plain JSON: no tuple, which would come back as a list and look like another config
    assert config_from_dict(read) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_replace_copies(config):
    assert dataclasses.replace(config, **CHANGES[type(config)]) != config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {},
            "Unknown sparsity method None. Choose one of: early_bird, gradual_pruning, lottery_ticket",
        ),
        ({"method": "lottery"}, "Unknown sparsity method 'lottery'"),
        ({"method": {}}, "Unknown sparsity method {}"),
        ({"method": ["lottery_ticket"]}, "Unknown sparsity method"),
        (
            {"method": "static_sparsity", "rounds": 3},
            "StaticSparsityConfig has no field 'rounds'. Choose from: budget",
        ),
        ({"method": "lottery_ticket", "sparsity": "0.5"}, "`sparsity` must be in"),
    ],
)
def test_hostile_dict(content, reason):
    with pytest.raises(ValueError, match=reason):
        config_from_dict(content)


def test_linear_sparsities():
    assert LotteryTicketConfig().sparsities() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], abs=1e-15)
    assert LotteryTicketConfig(sparsity=0.7, rounds=1).sparsities() == [0.7]
    assert LotteryTicketConfig(sparsity=0.9, rounds=7).sparsities()[-1] == 0.9


def test_geometric_sparsities():
    config = LotteryTicketConfig(sparsity=0.488, rounds=3, schedule="geometric")
    assert config.sparsities() == pytest.approx([0.2, 0.36, 0.488], abs=1e-12)
    assert config.sparsities()[-1] == 0.488


@pytest.mark.parametrize(
    ("sparsity", "per_round", "schedule", "rounds"),
    [
        (0.6, 0.1, "linear", 6),
        (0.9, 0.3, "linear", 3),
        (0.5, 0.5, "linear", 1),
        (0.7, 0.1, "linear", 7),
        (0.0, 0.1, "linear", 1),
        (0.488, 0.2, "geometric", 3),
        (0.2, 0.2, "geometric", 1),
        (0.99, 0.9, "geometric", 2),
        (1 - 0.8**20, 0.2, "geometric", 20),
        (0.5, 1e-6, "linear", 500_000),
    ],
)
def test_rounds_from_the_fraction_per_round(sparsity, per_round, schedule, rounds):
    config = LotteryTicketConfig(sparsity=sparsity, per_round=per_round, schedule=schedule)
    assert config.rounds == rounds
    assert LotteryTicketConfig(sparsity=sparsity, per_round=per_round, schedule=schedule, rounds=rounds) == config


def test_a_tiny_fraction_per_round_is_answered_at_once():
    with pytest.raises(ValueError, match="must reach `sparsity` exactly"):
        LotteryTicketConfig(sparsity=0.6, per_round=1e-300, schedule="geometric", rounds=1)


@pytest.mark.parametrize(
    ("sparsity", "per_round", "schedule", "choices"),
    [
        (0.55, 0.1, "linear", ["0.5", "0.6"]),
        (0.9, 0.4, "linear", ["0.8"]),  # 1.2 is no sparsity
        (0.1, 0.3, "linear", ["0.3"]),  # nor is dense a choice
        (0.7, 0.2, "geometric", ["0.67232", "0.737856"]),
    ],
)
def test_fraction_that_does_not_divide_names_choices_that_work(sparsity, per_round, schedule, choices):
    with pytest.raises(ValueError, match=f"Take sparsity {' or '.join(choices)}, or give `rounds`"):
        LotteryTicketConfig(sparsity=sparsity, per_round=per_round, schedule=schedule)
    for choice in choices:
        assert LotteryTicketConfig(sparsity=float(choice), per_round=per_round, schedule=schedule).rounds


SPARSITIES = [1, 1.0, -0.1, 2, math.nan, math.inf, True, "0.5", None]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", [LotteryTicketConfig, GradualPruningConfig, StaticSparsityConfig])
def test_sparsity_outside_its_range(kind, sparsity):
    with pytest.raises(ValueError, match="`sparsity`"):
        kind(sparsity=sparsity)


@pytest.mark.parametrize("kind", [LotteryTicketConfig, GradualPruningConfig, StaticSparsityConfig])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score": "movement"}, "Unknown score 'movement'. Choose one of: magnitude, gradient, random."),
        ({"budget": "er"}, "Unknown budget 'er'. Choose one of: global, uniform, erdos_renyi, erdos_renyi_kernel."),
        ({"seed": "x"}, "`seed` must be a whole number"),
        ({"include": 3}, "`include` must be a pattern or a list of patterns, got 3"),
        ({"exclude": ["a", 3]}, "`exclude` must be a pattern or a list"),
    ],
)
def test_common_fields(kind, options, reason):
    with pytest.raises(ValueError, match=reason):
        kind(sparsity=0.5, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": "cubic"}, "Unknown schedule 'cubic'. Choose one of: linear, geometric."),
        *[({"rounds": rounds}, "`rounds` must be a whole number of 1 or more") for rounds in (0, -1, 1.5, True)],
        *[({"per_round": value}, "`per_round` must be") for value in (0, 1, -0.1, math.nan, True)],
        ({"rounds": 3, "per_round": 0.1}, "`rounds` or `per_round`, not both, got rounds=3 and per_round=0.1"),
        ({"round_steps": 5, "round_epochs": 1.0}, "`round_steps` or `round_epochs`, not both, got 5 and 1.0"),
        ({"round_steps": 5.0}, "`round_steps` must be a whole number"),
        *[({"round_epochs": value}, "`round_epochs` must be more than 0") for value in (0, -1.0, math.nan, math.inf)],
        *[({"rewind_step": step}, "`rewind_step` must be an optimizer step") for step in (-1, 1.5, True)],
        ({"rewind_step": 5, "round_steps": 5}, "inside the first round of 5 steps, got 5"),
        ({"score_batches": 0}, "`score_batches` must be a whole number of 1 or more, got 0"),
        ({"score_batches": None}, "`score_batches` must be a whole number of 1 or more, got None"),
    ],
)
def test_lottery_ticket_fields(options, reason):
    with pytest.raises(ValueError, match=reason):
        LotteryTicketConfig(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"initial_sparsity": 0.7}, r"`initial_sparsity` must be at most `sparsity` \(0.6\), got 0.7"),
        ({"initial_sparsity": math.nan}, "`initial_sparsity` must be in"),
        ({"start_step": -1}, "`start_step` must be an optimizer step"),
        ({"start_step": 5, "end_step": 5}, r"`end_step` must come after `start_step` \(5\), got 5"),
        ({"end_step": 0}, "`end_step` must be a whole number of 1 or more"),
        ({"every": None}, "`every` must be a whole number of 1 or more, got None"),
        ({"every": 0}, "`every` must be a whole number of 1 or more, got 0"),
    ],
)
def test_gradual_pruning_fields(options, reason):
    with pytest.raises(ValueError, match=reason):
        GradualPruningConfig(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "Give either `ticket` or `sparsity`, got ticket=None, sparsity=None"),
        ({"ticket": "x", "sparsity": 0.5}, "Give either `ticket` or `sparsity`"),
        ({"ticket": 3}, "`ticket` must be a folder or a Hub id, got a int"),
        ({"ticket": "x", "score": "y"}, "Unknown score 'y'"),
    ],
)
def test_static_sparsity_fields(options, reason):
    with pytest.raises(ValueError, match=reason):
        StaticSparsityConfig(**options)


def test_a_path_becomes_the_text_that_json_can_hold():
    assert StaticSparsityConfig(ticket=Path("a") / "b").ticket == str(Path("a/b"))
