"""Fewer experts: what is not used can go, what is equal can be merged, and stock Transformers loads the rest."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_hf.moe.densify import densify
from sparse_hf.moe.expert_groups import most_used
from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.moe.thin_experts import drop_experts, merge_experts
from sparse_hf.moe.upcycle import upcycle
from sparse_hf.moe.usage import expert_usage
from tiny_dense import save_dense


FAMILIES = {pair.target.model_type: source for source, pairs in reversed(PAIRS.items()) for pair in pairs}
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
UP = "model.layers.{}.block_sparse_moe.experts.{}.w3.weight"


def make(tmp_path, target="mixtral", dtype=torch.float32, **options):
    """A mixture whose experts differ, by noise."""
    save_dense(tmp_path / "dense", FAMILIES[target], dtype)
    options = {"experts": 4, "router_std": 0.5, "init": ExpertInit(noise_std=0.2), "target": target, **options}
    upcycle(tmp_path / "dense", tmp_path / "moe", check_tokens=0, progress=False, **options)


def thin(tmp_path, how, usage, keep):
    assert how(tmp_path / "moe", tmp_path / "thin", usage, keep, progress=False)
    return weights(tmp_path / "thin")


def weights(folder):
    return load_file(folder / "model.safetensors")


def change(folder, edits):
    edits = {name: tensor.clone() for name, tensor in edits.items()}  # one tensor may be given under two names
    save_file({**weights(folder), **edits}, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def largest_difference(tmp_path, ids, names=("moe", "thin")):
    with torch.no_grad():
        one, other = (load(tmp_path / name)(input_ids=ids).logits for name in names)
    return float((one - other).abs().max() / one.abs().max())


def usage_of(*layers):
    return dict(enumerate(torch.tensor(layers)))


@pytest.mark.parametrize("how", [drop_experts, merge_experts])
@pytest.mark.parametrize("target", TARGETS)
def test_experts_that_were_never_chosen_can_go(tmp_path, target, how):
    make(tmp_path, target, experts=12)
    ids = torch.tensor([[7, 30, 61, 88]])  # 4 tokens with 2 experts each: at least 4 of 12 experts stay unused
    counts = expert_usage(load(tmp_path / "moe"), [{"input_ids": ids}]).counts
    keep = max(int((count > 0).sum()) for count in counts.values())
    assert keep <= 8
    assert any(not counts[layer][:keep].all() for layer in counts)  # numbers move
    ours = thin(tmp_path, how, counts, keep)
    assert largest_difference(tmp_path, ids) <= 1e-6
    model = load(tmp_path / "thin")
    assert getattr(model.config, TARGETS[target].count) == keep
    model.save_pretrained(tmp_path / "again")
    theirs = weights(tmp_path / "again")
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in theirs.items()}


def test_what_stays_by_hand(tmp_path):
    make(tmp_path)
    before, after = weights(tmp_path / "moe"), thin(tmp_path, drop_experts, usage_of([5, 1, 6, 0], [0, 3, 3, 3]), 2)
    for layer, kept in ((0, [0, 2]), (1, [1, 2])):
        assert torch.equal(after[ROUTER.format(layer)], before[ROUTER.format(layer)][kept])
        for new, old in enumerate(kept):
            for matrix in ("w1", "w2", "w3"):
                name = UP.replace("w3", matrix)
                assert torch.equal(after[name.format(layer, new)], before[name.format(layer, old)])
    rest = {name for name in before if "block_sparse_moe" not in name}
    assert rest == {name for name in after if "block_sparse_moe" not in name}
    assert all(torch.equal(after[name], before[name]) for name in rest)
    old, new = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("moe", "thin"))
    assert new == {**old, "num_local_experts": 2}


@pytest.mark.parametrize(
    ("target", "name", "shape"),
    [
        ("glm4_moe", "model.layers.1.mlp.gate.e_score_correction_bias", (4,)),
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias", (1, 4)),
        ("lfm2_moe", "model.layers.1.feed_forward.expert_bias", (4,)),
    ],
)
def test_the_bias_of_the_choice_follows(tmp_path, target, name, shape):
    make(tmp_path, target)
    change(tmp_path / "moe", {name: torch.arange(4.0).reshape(shape)})
    after = thin(tmp_path, drop_experts, usage_of([1, 1, 1, 1], [0, 2, 1, 9]), 2)
    assert torch.equal(after[name], torch.tensor([1.0, 3.0]).reshape(*shape[:-1], 2))


@pytest.mark.parametrize("common", [0.0, 100.0])
def test_groups_and_weights_by_hand(tmp_path, common):
    """Expert 3 is chosen like 0 and 2 like 1; what all rows share says nothing."""
    make(tmp_path)
    rows = torch.zeros(4, 32)
    rows[0, 0], rows[3, 0], rows[1, 1], rows[2, 1] = 1.0, 0.5, 1.0, 2.0
    ups = {UP.format(layer, one): torch.full((64, 32), 2.0**one) for layer in (0, 1) for one in range(4)}
    change(tmp_path / "moe", {**ups, ROUTER.format(0): rows + common, ROUTER.format(1): rows + common})
    after = thin(tmp_path, merge_experts, usage_of([6, 2, 1, 1], [3, 0, 0, 1]), 2)
    assert torch.equal(after[ROUTER.format(0)], rows[:2] + common)
    for new, expected in enumerate([(6 * 1 + 1 * 8) / 7, (2 * 2 + 1 * 4) / 3]):
        assert torch.allclose(after[UP.format(0, new)], torch.full((64, 32), expected))
    # In layer 1 experts 0 and 3 stay, and 1 and 2 join one of them, where they weigh nothing.
    assert torch.equal(after[UP.format(1, 0)], ups[UP.format(1, 0)])
    assert torch.equal(after[UP.format(1, 1)], ups[UP.format(1, 3)])


def test_a_group_without_use_is_a_plain_mean(tmp_path):
    make(tmp_path)
    rows = torch.zeros(4, 32)
    rows[0, 0], rows[1, 1], rows[2, 1], rows[3, 1] = 5.0, 1.0, 2.0, 3.0
    ups = {UP.format(layer, one): torch.full((64, 32), float(one)) for layer in (0, 1) for one in range(4)}
    change(tmp_path / "moe", {**ups, ROUTER.format(0): rows, ROUTER.format(1): rows})
    after = thin(tmp_path, merge_experts, usage_of([4, 0, 0, 0], [4, 0, 0, 0]), 2)
    assert not after[UP.format(0, 0)].any()
    assert torch.allclose(after[UP.format(0, 1)], torch.full((64, 32), 2.0))


@pytest.mark.parametrize(("target", "dtype"), [("mixtral", torch.float32), ("granitemoe", torch.bfloat16)])
def test_merging_equal_experts_changes_nothing(tmp_path, target, dtype):
    """Experts 2 and 3 are 0 and 1 again, with their rows; one is chosen, and of two equal ones it may be either."""
    make(tmp_path, target, dtype, top_k=1)
    tensors, same = weights(tmp_path / "moe"), {0: 2, 1: 3}
    for name, tensor in tensors.items():
        if "block_sparse_moe" in name and "experts." not in name:
            tensors[name] = torch.cat([tensor[:2], tensor[:2]])
        for one, other in same.items():
            if f"experts.{one}." in name:
                tensors[name.replace(f"experts.{one}.", f"experts.{other}.")] = tensor
    change(tmp_path / "moe", tensors)
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1))
    counts = expert_usage(load(tmp_path / "moe"), [{"input_ids": ids}]).counts
    usage = {layer: torch.tensor([9, 8, *count[2:].tolist()]) for layer, count in counts.items()}
    thin(tmp_path, merge_experts, usage, 2)
    assert largest_difference(tmp_path, ids) <= 1e-5


@pytest.mark.parametrize("how", [drop_experts, merge_experts])
def test_parts_stay_together(tmp_path, how):
    """3 copies in 2 parts; two copies stay whole, so the dense model's function does."""
    make(tmp_path, experts=3, init=ExpertInit(granularity=2))
    usage = usage_of([1, 0, 0, 0, 9, 9], [5, 5, 9, 0, 4, 4])
    with pytest.raises(ValueError, match="copies in 2 parts: keep a multiple of 2, got 3"):
        thin(tmp_path, how, usage, 3)
    before, after = weights(tmp_path / "moe"), thin(tmp_path, how, usage, 4)
    assert torch.equal(after[ROUTER.format(0)], before[ROUTER.format(0)][[0, 1, 4, 5]])
    assert torch.equal(after[ROUTER.format(1)], before[ROUTER.format(1)][[0, 1, 2, 3]])
    ids = torch.arange(3, 20)[None]
    assert largest_difference(tmp_path, ids, ("dense", "thin")) <= 1e-5


def test_parts_of_one_ffn_are_not_averaged(tmp_path):
    make(tmp_path, experts=1, top_k=2, init=ExpertInit(granularity=4))
    with pytest.raises(ValueError, match="parts of one FFN"):
        thin(tmp_path, merge_experts, usage_of([1, 2, 3, 4], [1, 2, 3, 4]), 3)
    assert thin(tmp_path, drop_experts, usage_of([1, 2, 3, 4], [1, 2, 3, 4]), 3)[ROUTER.format(0)].shape[0] == 3


def test_a_thinned_mixture_remembers_where_it_came_from(tmp_path):
    make(tmp_path, "mixtral", init=ExpertInit())
    thin(tmp_path, drop_experts, usage_of([1, 2, 3, 4], [1, 2, 3, 4]), 3)
    densify(tmp_path / "thin", tmp_path / "back", progress=False)
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("target", "options", "keep", "match"),
    [
        ("mixtral", {}, 1, "between the 2 that each token uses and the 4 there are, got 1"),
        ("mixtral", {}, 5, "got 5"),
        ("mixtral", {}, 2.0, "got 2.0"),
        ("glm4_moe", {"top_k": 1}, 1, "`n_group` = 1 and 1 experts to keep"),
    ],
)
def test_numbers(tmp_path, target, options, keep, match):
    make(tmp_path, target, **options)
    with pytest.raises(ValueError, match=match):
        thin(tmp_path, drop_experts, usage_of([1, 1, 1, 1], [1, 1, 1, 1]), keep)
    assert not (tmp_path / "thin").exists()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_the_most_used_are_kept(values, data):
    keep = data.draw(st.integers(1, len(values)))
    kept = most_used(values, keep, 1)
    rest = [one for one in range(len(values)) if one not in kept]
    assert kept == sorted(set(kept))
    assert len(kept) == keep
    # Whoever goes is used less than every one that stays, or equally and comes later.
    assert all((values[one], -one) > (values[other], -other) for one in kept for other in rest)
