"""How many heads and neurons stay, and which; magnitudes by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_hf.anatomy.units import find_units
from sparse_hf.tickets.draw_units import draw_units, is_tied, magnitude_scores
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.latency_table import LatencyTable, choose_unit_counts
from tiny_models import tiny_model
from tiny_slim import GROUPED, OPT_TABLE, VARIANTS, tiny_variant


def random_scores(layers=3, heads=12, neurons=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"heads": heads, "neurons": neurons}
    return {
        f"layer.{number}.{kind}": torch.rand(size, generator=generator)
        for number in range(layers)
        for kind, size in sizes.items()
    }


def counts_of(masks, kind):
    return [int(mask.sum()) for key, mask in masks.items() if key.endswith(kind)]


def assert_highest_stay(scores, masks):
    for key, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.all() or scores[key][mask].min() >= scores[key][~mask].max()


def test_the_default_of_bert_base_is_earlybert_s():
    scores = random_scores(layers=12, neurons=3072)
    masks = draw_units(scores, EarlyBirdConfig())
    assert list(masks) == list(scores)
    assert counts_of(masks, "heads") == 12 * [8]
    neurons = counts_of(masks, "neurons")
    assert all(count % 16 == 0 for count in neurons)
    assert len(set(neurons)) > 1  # they compete with those of the other layers
    assert sum(neurons) == 22112  # of 12 * 3072 * 0.6 = 22118.4, the nearest multiple
    assert_highest_stay(scores, masks)


def test_neurons_per_layer():
    masks = draw_units(random_scores(), EarlyBirdConfig(neuron_scope="layer"))
    assert counts_of(masks, "neurons") == 3 * [32]  # of 38.4: 32 is nearer than 48
    masks = draw_units(random_scores(), EarlyBirdConfig(uniform=True, neuron_multiple=1, neurons=0.25))
    assert counts_of(masks, "neurons") == 3 * [48]


def test_heads_globally():
    scores = random_scores()
    scores["layer.0.heads"] += 1
    masks = draw_units(scores, EarlyBirdConfig(head_scope="global"))
    first, *rest = counts_of(masks, "heads")
    assert (first, sum(rest)) == (12, 12)  # 24 of 36
    scores["layer.0.heads"] -= 2
    masks = draw_units(scores, EarlyBirdConfig(head_scope="global"))
    assert counts_of(masks, "heads")[0] == 1  # never none
    assert masks["layer.0.heads"][scores["layer.0.heads"].argmax()]


@given(
    fraction=st.floats(0, 0.7),  # of 64 neurons at least 16 stay
    scopes=st.tuples(*2 * [st.sampled_from(["layer", "global"])]),
    multiple=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 9),
)
def test_counts_are_exact(fraction, scopes, multiple, seed):
    scores = random_scores(seed=seed)
    config = EarlyBirdConfig(
        heads=fraction, neurons=fraction, head_scope=scopes[0], neuron_scope=scopes[1], neuron_multiple=multiple
    )
    masks = draw_units(scores, config)
    assert_highest_stay(scores, masks)
    for kind, scope, block, width in (("heads", scopes[0], 1, 12), ("neurons", scopes[1], multiple, 64)):
        counts = counts_of(masks, kind)
        parts = [sum(counts) / 3] if scope == "global" else counts
        slack = (block + 1) / 2 if scope == "layer" else (block + 1) / 6  # rounded to units, then to blocks
        assert all(abs(part - width * (1 - fraction)) <= slack + 1e-9 for part in parts)
        assert all(count >= 1 and count % block == 0 for count in counts)
        assert scope == "global" or len(set(counts)) == 1


def test_nothing_to_cut_keeps_all():
    scores = random_scores()
    masks = draw_units(scores, EarlyBirdConfig(heads=0, neurons=0))
    assert all(mask.all() for mask in masks.values())
    assert not is_tied(scores, masks, EarlyBirdConfig(heads=0, neurons=0))


def test_a_budget_that_empties_a_layer_is_refused():
    with pytest.raises(ValueError, match="would empty a layer"):
        draw_units(random_scores(heads=2), EarlyBirdConfig(heads=0.9))
    with pytest.raises(ValueError, match="would empty a layer"):
        draw_units(random_scores(), EarlyBirdConfig(neurons=0.9))  # 19 of 192 are fewer than a block per layer


@pytest.mark.parametrize("what", ["heads", "neurons"])
def test_ties_of_either_kind_count(what):
    config, scores = EarlyBirdConfig(), random_scores()
    assert not is_tied(scores, draw_units(scores, config), config)
    tied = {key: torch.ones_like(score) if key.endswith(what) else score for key, score in scores.items()}
    masks = draw_units(tied, config)
    assert is_tied(tied, masks, config)
    kept = masks[f"layer.0.{what}"]
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # by index


TABLE = LatencyTable(
    heads=(3.0, 4.0),
    neuron_counts=(16, 32),
    neurons=(3.0, 5.0),
    fixed=2.0,
    layers=2,
    dense=20.0,
    what="training",
    batch=1,
    length=8,
    device="cpu",
    threads=1,
)


def test_a_target_speedup_spends_time_where_the_scores_are():
    scores = random_scores(2, heads=2, neurons=32)
    scores["layer.0.heads"], scores["layer.1.heads"] = torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5])
    scores["layer.0.neurons"], scores["layer.1.neurons"] = torch.arange(32.0), torch.ones(32)
    config = EarlyBirdConfig(target_speedup=20 / 17.1)
    masks = draw_units(scores, config, TABLE)
    assert list(masks) == list(scores)
    # At least 2 + 2 * 3 + 2 * 3 = 14 s. Of the 3.1 s more, one buys a head: the second layer's, worth 0.4 over the
    # least head to the first's 0. Two buy 16 neurons: the first layer's lower half, worth 0 + 1 + ... + 15 = 120 to
    # the second's 16.
    assert {key: int(mask.sum()) for key, mask in masks.items()} == {
        "layer.0.heads": 1,
        "layer.0.neurons": 32,
        "layer.1.heads": 2,
        "layer.1.neurons": 16,
    }
    assert masks["layer.0.heads"].tolist() == [False, True]
    assert masks["layer.1.neurons"].tolist() == 16 * [True] + 16 * [False]
    assert is_tied(scores, masks, config)  # the ones


def test_a_target_speedup_draws_the_counts_of_the_table():
    scores, config = random_scores(2, heads=2, neurons=32), EarlyBirdConfig(target_speedup=1.2)
    masks = draw_units(scores, config, TABLE)
    counts = {key: int(mask.sum()) for key, mask in masks.items()}
    least = {kind: min(float(scores[f"layer.{n}.{kind}"].min()) for n in (0, 1)) for kind in ("heads", "neurons")}
    worth = {key: score - least[key.rpartition(".")[2]] for key, score in scores.items()}
    assert counts == choose_unit_counts(worth, TABLE, 1.2, 16)
    assert TABLE.predicted(counts) <= 20 / 1.2
    assert_highest_stay(scores, masks)
    assert not is_tied(scores, masks, config)
    moved = {key: score / 64 + 1 if key.endswith("heads") else score - 8 for key, score in scores.items()}
    assert {key: int(mask.sum()) for key, mask in draw_units(moved, config, TABLE).items()} == counts
    with pytest.raises(ValueError, match="`target_speedup=3.0` cannot be reached"):
        draw_units(scores, EarlyBirdConfig(target_speedup=3.0), TABLE)


def norm(*parts):
    return torch.cat([part.detach().flatten() for part in parts]).norm()


def by_hand(variant, model):
    """Norms of the heads and the neurons of the second layer, as the family lays them out."""
    if variant == "bert":
        layer = model.bert.encoder.layer[1]
        attention, up, down = layer.attention, layer.intermediate.dense.weight, layer.output.dense.weight
        inner = [getattr(attention.self, name).weight for name in ("query", "key", "value")]
        rows = [slice(8 * head, 8 * head + 8) for head in range(4)]
        heads = [norm(*(one[row] for one in inner), attention.output.dense.weight[:, row]) for row in rows]
        return heads, [norm(up[unit], down[:, unit]) for unit in range(64)]
    if variant == "gpt2":  # Conv1D: (in, out); queries, keys and values side by side
        layer = model.transformer.h[1]
        parts = (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj)
        fused, out, up, down = (part.weight for part in parts)
        columns = [[slice(32 * part + 8 * head, 32 * part + 8 * head + 8) for part in range(3)] for head in range(4)]
        heads = [norm(*(fused[:, one] for one in three), out[three[0]]) for three in columns]
        return heads, [norm(up[:, unit], down[unit]) for unit in range(128)]
    layer = model.model.layers[1]  # four groups, each of two query heads and one key/value head of width 4
    attention, mlp = layer.self_attn, layer.mlp
    heads = [
        norm(
            attention.q_proj.weight[8 * group : 8 * group + 8],
            attention.k_proj.weight[4 * group : 4 * group + 4],
            attention.v_proj.weight[4 * group : 4 * group + 4],
            attention.o_proj.weight[:, 8 * group : 8 * group + 8],
        )
        for group in range(4)
    ]
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return heads, [norm(gate[unit], up[unit], down[:, unit]) for unit in range(64)]


@pytest.mark.parametrize("variant", ["bert", "gpt2", "llama-tied"])
def test_magnitudes_by_hand(variant):
    model = tiny_variant(variant)
    scores = magnitude_scores(nn.DataParallel(model))
    assert list(scores) == [one.key for one in find_units(model)]
    for score, wanted in zip(list(scores.values())[2:], by_hand(variant, model), strict=True):
        torch.testing.assert_close(score, torch.stack(wanted))


@pytest.mark.parametrize("variant", VARIANTS)
def test_magnitudes_of_every_family(variant):
    """There is one for each unit, in fp32, and other weights in the last unit's column change its score alone."""
    model = tiny_variant(variant).to(torch.bfloat16)
    scores = magnitude_scores(model)
    assert {key: len(score) for key, score in scores.items()} == {one.key: one.count for one in find_units(model)}
    assert all(score.dtype == torch.float32 and (score > 0).all() for score in scores.values())
    one = find_units(model)[-1]
    output = model.get_submodule(one.output)
    with torch.no_grad():
        (output.weight if isinstance(output, nn.Linear) else output.weight.T)[:, 5] += 3
    changed = magnitude_scores(model)
    assert [key for key in scores if not torch.equal(changed[key], scores[key])] == [one.key]
    assert (changed[one.key] != scores[one.key]).nonzero().flatten().tolist() == [5]
    assert changed[one.key][5] > scores[one.key][5]


def test_magnitudes_of_a_family_outside_the_tables():
    model = tiny_model("opt")
    scores = magnitude_scores(model, OPT_TABLE)
    layer = model.decoder.layers[0]
    assert scores["decoder.layers.0.neurons"][7] == pytest.approx(
        norm(layer.fc1.weight[7], layer.fc2.weight[:, 7]).item(), rel=1e-6
    )
    assert len(magnitude_scores(tiny_model("llama", **GROUPED))["layers.0.heads"]) == 4
