"""The latency table's numbers and the choice of counts, by hand and against brute force."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf.tickets.latency_table import LatencyTable, choose_unit_counts


HEADS, NEURONS = "encoder.layer.{}.heads", "encoder.layer.{}.neurons"

# Two layers of 3 heads (1, 2, 3 s) and 32 neurons (1 s for 8, 4 s for 32), and 2 s around them: 2 + 2 * (3 + 4) = 16.
TABLE = LatencyTable(
    heads=(1.0, 2.0, 3.0),
    neuron_counts=(8, 32),
    neurons=(1.0, 4.0),
    fixed=2.0,
    layers=2,
    dense=16.0,
    what="training",
    batch=8,
    length=128,
    device="cpu",
    threads=1,
)


def counts(*numbers):
    """Heads and neurons of layer 0, then of layer 1."""
    keys = [template.format(layer) for layer in range(len(numbers) // 2) for template in (HEADS, NEURONS)]
    return dict(zip(keys, numbers, strict=True))


def scores(first_heads, second_heads, first_neurons=1.0, second_neurons=1.0):
    neurons = [torch.full((32,), first_neurons), torch.full((32,), second_neurons)]
    return counts(torch.tensor(first_heads), neurons[0], torch.tensor(second_heads), neurons[1])


def test_predicted_seconds_by_hand():
    assert TABLE.predicted(counts(3, 32, 3, 32)) == TABLE.dense
    assert TABLE.predicted(counts(1, 8, 2, 32)) == 2 + (1 + 1) + (2 + 4)
    assert TABLE.predicted(counts(1, 16, 1, 20)) == 2 + (1 + 2) + (1 + 2.5)  # linear between 8 and 32
    assert TABLE.predicted(counts(1, 1, 1, 8)) == 2 + 2 + 2  # below the smallest measured count


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (counts(0, 8, 1, 8), "`encoder.layer.0.heads` must keep 1 to 3 units, got 0"),
        (counts(1, 8, 1, 33), "`encoder.layer.1.neurons` must keep 1 to 32 units, got 33"),
        (counts(1, 8), "of 2 layers, each with heads and neurons, got 1 keys of heads and 1 of neurons among 2"),
        ({**counts(1, 8, 1, 8), "pooler.width": 3}, "got 2 keys of heads and 2 of neurons among 5"),
    ],
)
def test_counts_of_another_model_have_no_prediction(asked, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        TABLE.predicted(asked)


def test_choice_by_hand():
    # A speed-up of 1.6 leaves 10 - 2 = 8 s, of which the smallest layers take 4. The other 4 s buy heads and blocks of
    # 8 neurons at 1 s each. Of all heads' scores (sum 10) the second of layer 0 has 0.3, its third 0.2, those of layer
    # 1 nothing; a block of neurons is worth 1/8. So both heads of layer 0, then two blocks of any layer.
    chosen = choose_unit_counts(scores([3.0, 5.0, 2.0], [-1.0, -2.0, -3.0]), TABLE, 1.6, multiple_of=8)
    assert [chosen[HEADS.format(layer)] for layer in (0, 1)] == [3, 1]
    assert sum(chosen[NEURONS.format(layer)] for layer in (0, 1)) == 32
    assert TABLE.predicted(chosen) == 10.0
    assert list(chosen) == list(counts(0, 0, 0, 0))


def test_neurons_go_where_their_scores_are():
    chosen = choose_unit_counts(scores([1.0] * 3, [1.0] * 3, 0.1, 0.9), TABLE, 1.6, multiple_of=8)
    # a head is worth 1/6, a block of layer 1 0.9/4, one of layer 0 0.1/4: three blocks, then one head
    assert (chosen[NEURONS.format(0)], chosen[NEURONS.format(1)]) == (8, 32)
    assert chosen[HEADS.format(0)] + chosen[HEADS.format(1)] == 3


def test_every_layer_keeps_a_head_and_a_block_even_without_any_score():
    nothing = scores([-1.0] * 3, [0.0] * 3, -1.0, 0.0)
    assert choose_unit_counts(nothing, TABLE, 16 / 6, multiple_of=8) == counts(1, 8, 1, 8)


def test_a_width_that_is_no_multiple_may_stay_whole():
    narrow = dataclasses.replace(TABLE, neuron_counts=(16, 20), neurons=(1.0, 1.0))
    cut = {
        key: score[:20] if key.endswith("neurons") else score for key, score in scores([1.0] * 3, [1.0] * 3).items()
    }
    assert choose_unit_counts(cut, narrow, 1.6, multiple_of=16)[NEURONS.format(0)] == 20
    assert choose_unit_counts(cut, narrow, 1.6, multiple_of=64)[NEURONS.format(1)] == 20


def worth(unit_scores, chosen):
    total = 0.0
    for kind in ("heads", "neurons"):
        keys = [key for key in unit_scores if key.endswith(kind)]
        ordered = {key: unit_scores[key].double().clamp(min=0).sort(descending=True).values for key in keys}
        kept = sum(ordered[key][: chosen[key]].sum() for key in keys)
        total += float(kept / sum(ordered[key].sum() for key in keys))
    return total


@given(st.integers(0, 10**6), st.sampled_from([1.2, 1.6, 2.0, 2.5]), st.booleans())
@settings(max_examples=40)
def test_no_other_choice_within_the_budget_is_worth_more(seed, target, near_one):
    generator = torch.Generator().manual_seed(seed)
    shapes = counts(3, 32, 3, 32)
    drawn = {key: torch.rand(size, generator=generator) for key, size in shapes.items()}
    if near_one:  # coefficients after a short search
        drawn = {key: 1 - 0.005 * score for key, score in drawn.items()}
    chosen = choose_unit_counts(drawn, TABLE, target, multiple_of=8)
    options = [counts(*c) for c in itertools.product(*[(1, 2, 3), (8, 16, 24, 32)] * 2)]
    allowed = [option for option in options if TABLE.predicted(option) <= TABLE.dense / target]
    # The knapsack rounds costs up to 1/16384 of what can be spent, so what fits exactly may miss by a step ...
    near = [option for option in allowed if TABLE.predicted(option) <= TABLE.dense / target - 0.01]
    assert chosen in allowed
    assert worth(drawn, chosen) >= max(worth(drawn, option) for option in near) - 1e-12
    assert worth(drawn, chosen) <= max(worth(drawn, option) for option in allowed) + 1e-12


@pytest.mark.parametrize("target", [1.0, 0.5, -2.0, math.nan])
def test_a_target_must_be_faster(target):
    with pytest.raises(ValueError, match="`target_speedup` must be above 1"):
        choose_unit_counts(scores([1.0] * 3, [1.0] * 3), TABLE, target)


def test_an_unreachable_target_names_the_largest():
    even = scores([1.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match=r"`target_speedup=3.0` cannot be reached.* is 2.666 times as fast.*training"):
        choose_unit_counts(even, TABLE, 3.0, multiple_of=8)
    assert choose_unit_counts(even, TABLE, 2.666, multiple_of=8) == counts(1, 8, 1, 8)
    with pytest.raises(ValueError, match="is 2.0 times as fast"):  # two blocks of 16 cost 1 s more each
        choose_unit_counts(even, TABLE, 2.5, multiple_of=16)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({HEADS.format(0): torch.ones(4)}, "`encoder.layer.0.heads` must have 3 floating scores"),
        (
            {NEURONS.format(1): torch.ones(32, dtype=torch.long)},
            "floating scores as in the latency table, got torch.i",
        ),
        ({NEURONS.format(0): torch.full((32,), math.nan)}, "Scores must be finite, got NaN"),
        ({HEADS.format(2): torch.ones(3)}, "got 3 keys of heads and 2 of neurons"),
    ],
)
def test_scores_of_another_model_are_refused(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        choose_unit_counts({**scores([1.0] * 3, [1.0] * 3), **changes}, TABLE, 1.5)


def test_multiple_of_must_be_positive():
    with pytest.raises(ValueError, match="`multiple_of` must be at least 1, got 0"):
        choose_unit_counts(scores([1.0] * 3, [1.0] * 3), TABLE, 1.5, multiple_of=0)


def test_json_round_trip():
    assert LatencyTable.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads", []),
        ("heads", [2.0, 1.0]),
        ("heads", [1.0, math.nan, 2.0]),
        ("heads", "123"),
        ("heads", [True, True]),
        ("neurons", [-1.0, 4.0]),
        ("neurons", [1.0, 10**400]),
        ("neurons", [1.0]),
        ("neurons", {"8": 1.0}),
        ("neuron_counts", [32, 8]),
        ("neuron_counts", [8, 8]),
        ("neuron_counts", [0, 8]),
        ("neuron_counts", [8.0, 32.0]),
        ("neuron_counts", [8, 2**70]),
        ("neuron_counts", None),
        ("fixed", -1.0),
        ("fixed", math.inf),
        ("fixed", "2"),
        ("dense", 0.0),
        ("layers", 0),
        ("layers", True),
        ("batch", 1.5),
        ("length", None),
        ("threads", [1]),
        ("what", "both"),
        ("what", ["training"]),
        ("device", 3),
    ],
)
def test_hostile_entries_are_refused(name, value):
    with pytest.raises(ValueError, match=f"must hold what was measured: `(neuron_counts|{name})`"):
        LatencyTable.from_dict({**TABLE.to_dict(), name: value})


@pytest.mark.parametrize("content", [None, [], "x", {}, {**TABLE.to_dict(), "code": "x"}])
def test_other_content_is_no_table(content):
    with pytest.raises(ValueError, match="A latency table must have the entries"):
        LatencyTable.from_dict(content)
