"""Experts that are more than copies: parts, halves, partly new, noisy, of several models."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.upcycle import plan_upcycling, upcycle
from tiny_dense import save_dense
from whole_models import largest_difference


def quiet(source, destination, **options):
    options = {"experts": 4, "check_tokens": 0, "progress": False, "router_std": 0.5, **options}
    return upcycle(source, destination, **options)


def difference(tmp_path, family, **options):
    save_dense(tmp_path / "dense", family)
    plan = quiet(tmp_path / "dense", tmp_path / "moe", **options)
    return plan, largest_difference(tmp_path / "dense", tmp_path / "moe", plan.config, 48, 0)


def weights(folder):
    return load_file(folder / "model.safetensors")


FFN, EXPERT = "model.layers.1.mlp.{}.weight", "model.layers.1.mlp.experts.{}.{}.weight"
MATRICES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("top_k", [4, 8])
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "mixtral"),
        ("qwen3", "qwen3_moe"),
        ("granite", "granitemoe"),
        ("qwen3", "glm4_moe"),
        ("qwen2", "qwen2_moe"),
        ("lfm2", "lfm2_moe"),
        ("cohere2", "cohere2_moe"),
    ],
)
def test_parts_that_are_chosen_together_compute_the_same(tmp_path, family, target, top_k):
    options = {"target": target, "top_k": top_k, "init": ExpertInit(granularity=4)}
    plan, found = difference(tmp_path, family, **options)
    assert found <= 1e-5
    assert plan.changed is None
    # GLM-4-MoE's idle shared expert is as wide as a part, Qwen2-MoE's an eighth of the dense FFN.
    shared = {"glm4_moe": 1 / 4, "qwen2_moe": 1 / 8}.get(target, 0)
    assert f"16 experts, top {top_k}" in str(plan)
    assert f"FLOPs per token {top_k / 4 + shared:.2f} x dense" in str(plan)


def test_parts_are_slices_and_a_power_of_two_is_exact(tmp_path):
    save_dense(tmp_path / "dense", "qwen3", torch.bfloat16)
    quiet(tmp_path / "dense", tmp_path / "moe", top_k=4, init=ExpertInit(granularity=4))
    dense, moe = weights(tmp_path / "dense"), weights(tmp_path / "moe")
    for expert in range(16):
        part = slice(16 * (expert % 4), 16 * (expert % 4 + 1))
        for matrix in MATRICES:
            whole = dense[FFN.format(matrix)]
            expected = 4 * whole[:, part] if matrix == "down_proj" else whole[part]
            assert torch.equal(moe[EXPERT.format(expert, matrix)], expected)
    rows = moe["model.layers.1.mlp.gate.weight"].view(4, 4, -1)
    assert (rows == rows[:, :1]).all()
    assert (rows[0] != rows[1]).any()


def test_a_spread_scale_is_told_to_change_the_function(tmp_path):
    init = ExpertInit(granularity=4, scale="spread")
    plan, found = difference(tmp_path, "qwen3", top_k=4, init=init, check_tokens=32)
    assert found > 1e-3
    assert "Not exact: the scale is spread" in str(plan)
    told = json.loads((tmp_path / "moe" / "sparse_hf.json").read_text())
    assert told["exact"] is False
    assert told["logits_difference"] > 1e-3
    dense, moe = weights(tmp_path / "dense"), weights(tmp_path / "moe")
    for matrix in MATRICES:
        part = dense[FFN.format(matrix)][:, :16] if matrix == "down_proj" else dense[FFN.format(matrix)][:16]
        torch.testing.assert_close(moe[EXPERT.format(0, matrix)], 4 ** (1 / 3) * part)


@pytest.mark.parametrize(("top_k", "granularity"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2", "qwen2_moe"),
        ("llama", "glm4_moe"),
        ("qwen3", "dots1"),
        ("granite", "granitemoeshared"),
        ("hunyuan_v1_dense", "hunyuan_v1_moe"),
        ("qwen3_5_text", "qwen3_5_moe_text"),
    ],
)
def test_half_of_the_ffn_is_shared(tmp_path, family, target, top_k, granularity):
    init = ExpertInit(granularity=granularity, shared_half=True)
    if target == "hunyuan_v1_moe" and granularity > 1:
        save_dense(tmp_path / "dense", family)
        with pytest.raises(ValueError, match="as wide as any other, so `shared_half` needs `granularity` 1, got 2"):
            quiet(tmp_path / "dense", tmp_path / "moe", target=target, top_k=top_k, init=init)
        return
    plan, found = difference(tmp_path, family, target=target, top_k=top_k, init=init)
    assert found <= 1e-5
    assert f"FLOPs per token {0.5 + 0.5 * top_k / granularity:.2f} x dense" in str(plan)


@pytest.mark.parametrize(("top_k", "exact"), [(4, True), (2, False)])
def test_a_split_is_the_whole_only_when_all_parts_are_chosen(tmp_path, top_k, exact):
    init = ExpertInit(granularity=4)
    options = {"experts": 1, "top_k": top_k, "router_std": 0.0}  # equal weights
    plan, found = difference(tmp_path, "llama", **options, init=init)
    assert (found <= 1e-5) == exact
    assert plan.changed == "each token passes some parts of the FFN only"


def test_dropped_neurons_are_those_of_all_three_matrices(tmp_path):
    plan, found = difference(tmp_path, "qwen3", init=ExpertInit(drop=0.25))
    assert found > 1e-3
    assert "25% of each expert's neurons are drawn anew" in str(plan)
    dense, moe = weights(tmp_path / "dense"), weights(tmp_path / "moe")
    chosen = []
    for expert in range(4):
        changed = {}
        for matrix in MATRICES:
            same = moe[EXPERT.format(expert, matrix)] == dense[FFN.format(matrix)]
            same = same.T if matrix == "down_proj" else same
            assert (same.all(1) | ~same.any(1)).all()
            changed[matrix] = (~same.any(1)).nonzero().flatten().tolist()
        assert len(changed["gate_proj"]) == 16
        assert changed["gate_proj"] == changed["up_proj"] == changed["down_proj"]
        chosen.append(tuple(changed["gate_proj"]))
    assert len(set(chosen)) == 4


def test_noise_is_as_large_as_asked_and_differs(tmp_path):
    difference(tmp_path, "qwen3", init=ExpertInit(noise_std=0.05))
    dense, moe = weights(tmp_path / "dense"), weights(tmp_path / "moe")
    noise = [moe[EXPERT.format(expert, "up_proj")] - dense[FFN.format("up_proj")] for expert in range(4)]
    assert all(abs(float(one.std()) / 0.05 - 1) < 0.1 for one in noise)
    assert abs(float(torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize("average", [False, True])
def test_branches_become_experts_in_turn(tmp_path, average):
    folders = [tmp_path / name for name in ("dense", "a", "b")]
    for seed, folder in enumerate(folders):
        save_dense(folder, "qwen3", seed=seed)
    plan = quiet(folders[0], tmp_path / "moe", branches=folders[1:], average=average)
    assert "Not exact: experts come from 2 models" in str(plan)
    dense, *branches = map(weights, folders)
    moe = weights(tmp_path / "moe")
    for expert in range(4):
        for matrix in MATRICES:
            assert torch.equal(moe[EXPERT.format(expert, matrix)], branches[expert % 2][FFN.format(matrix)])
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = (branches[0][name] + branches[1][name]) / 2 if average else dense[name]
    torch.testing.assert_close(moe[name], expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def test_equal_branches_compute_the_same(tmp_path):
    for folder in ("a", "b"):
        save_dense(tmp_path / folder, "qwen3")
    options = {"branches": (tmp_path / "a", tmp_path / "b"), "average": True}
    _, found = difference(tmp_path, "qwen3", **options)
    assert found <= 1e-5


def test_branches_must_be_alike(tmp_path):
    save_dense(tmp_path / "dense", "qwen3")
    save_dense(tmp_path / "wider", "qwen3", intermediate_size=96)
    save_dense(tmp_path / "other", "qwen3", rms_norm_eps=1e-3)
    for branch, match in (
        ("wider", r"\[64, 32\] in the source and F32 \[96, 32\]|\[32, 64\]"),
        ("other", "`rms_norm_"),
    ):
        with pytest.raises(ValueError, match=match):
            plan_upcycling(tmp_path / "dense", tmp_path / "moe", branches=(tmp_path / branch,))
    with pytest.raises(ValueError, match="`experts` must be a multiple of the 3 branches, got 8"):
        plan_upcycling(tmp_path / "dense", tmp_path / "moe", branches=(tmp_path / "dense",) * 3)
    with pytest.raises(ValueError, match="`average` needs `branches`"):
        plan_upcycling(tmp_path / "dense", tmp_path / "moe", average=True)


@pytest.mark.parametrize("granularity", [1, 2])
def test_given_router_rows_are_taken_in_turn_with_a_little_noise(tmp_path, granularity):
    rows = {layer: np.random.default_rng(layer).standard_normal((2, 32)) for layer in range(2)}
    init = ExpertInit(granularity=granularity)
    difference(tmp_path, "qwen3", router_rows=rows, router_std=0.01, init=init)
    router = weights(tmp_path / "moe")["model.layers.1.mlp.gate.weight"].numpy()
    router = router.reshape(4, granularity, 32)
    assert (router == router[:, :1]).all()
    assert np.abs(router[:, 0] - np.tile(rows[1], (2, 1))).max() < 0.06
    assert (router[0] != router[2]).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"experts": 1}, "`experts` must be 2 or more, got 1; or 1 with a `granularity`"),
        ({"init": ExpertInit(granularity=4)}, "multiple of the granularity, .*: 4 costs as much .* got 2"),
        ({"init": ExpertInit(granularity=3), "top_k": 3}, "64 neurons must divide into 3 equal parts"),
        ({"init": ExpertInit(shared_half=True)}, "needs a target with a shared expert, qwen3_moe has none"),
        ({"init": ExpertInit(granularity=2), "router_std": 0.0}, "must tell copies apart, got zeros"),
        ({"router_rows": {0: np.ones((2, 32))}}, r"layer 1 must have the shape \[domains, 32\], got nothing"),
        ({"router_rows": {0: np.ones((2, 8))}}, r"layer 0 must have the shape \[domains, 32\], got \[2, 8\]"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, options, match):
    save_dense(tmp_path / "dense", "qwen3")
    with pytest.raises(ValueError, match=match):
        plan_upcycling(tmp_path / "dense", tmp_path / "moe", **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": 0}, "`granularity` must be 1 or more"),
        ({"scale": "up"}, "must be 'down' or 'spread'"),
        ({"drop": 1.0}, r"`drop` must be in \[0, 1\)"),
        ({"noise_std": -1.0}, "`noise_std` must be 0 or more"),
        ({"drop": 0.5, "granularity": 2}, "leave `granularity`, `shared_half` and `noise_std` out"),
    ],
)
def test_inits_that_are_none(options, match):
    with pytest.raises(ValueError, match=match):
        ExpertInit(**options)
