"""What a new adapter chooses: S2's places, S1's zeros, and which base it remembers."""

import pytest
import torch
from peft import get_peft_model

from dsee.tiny_dsee import FAMILY, adapter_tensors, assert_same, base_model, dsee_config, dsee_model, layers, stir
from sparse_hf.dsee.config import SUPPORTS


def places(layer, adapter="default"):
    """S2's entries as a bool matrix of y = W x: (out, in)."""
    chosen = torch.zeros(layer.weight_shape, dtype=torch.bool)
    chosen.view(-1)[layer.sparse_hf_dsee_indices[adapter].long()] = True
    return chosen.t() if layer.input_first else chosen


def w0(layer):
    weight = layer.frozen_weight().detach()
    return weight.t() if layer.input_first else weight


def kept(layer):
    mask = layer.sparse_hf_dsee_baked.mask(layer.weight)
    return mask.t() if layer.input_first else mask


@FAMILY
@pytest.mark.parametrize("support", SUPPORTS)
def test_every_support_has_exactly_nnz_entries_and_is_deterministic(family, support):
    nnz = {"rows": 64, "columns": 3 * 96 if family == "gpt2" else 64}.get(support, 37)
    first, second = (dsee_model(family, support=support, nnz=nnz, stirred=False) for _ in range(2))
    assert_same(adapter_tensors(first), adapter_tensors(second))
    for layer in layers(first).values():
        assert int(places(layer).sum()) == nnz
        assert (layer.sparse_hf_dsee_indices["default"].diff() > 0).all()


@FAMILY
def test_magnitude_takes_the_largest_of_w0_and_not_of_what_s1_left(family):
    model = dsee_model(family, nnz=40)
    for layer in layers(model).values():
        magnitudes = w0(layer).abs()
        assert magnitudes[places(layer)].min() >= magnitudes[~places(layer)].max()


@FAMILY
@pytest.mark.parametrize("support", ["rows", "columns"])
def test_rows_and_columns_are_those_of_the_map(family, support):
    length = 32 if support == "rows" else (96 if family == "gpt2" else 32)
    if family == "llama":
        model = dsee_model(family, support=support, nnz=2 * length, target_modules=["q_proj"])
    else:
        model = dsee_model(family, support=support, nnz=2 * length)
    for layer in layers(model).values():
        chosen = places(layer) if support == "rows" else places(layer).t()
        norms = (w0(layer) if support == "rows" else w0(layer).t()).norm(dim=1)
        whole = chosen.all(dim=1)
        assert torch.equal(whole, chosen.any(dim=1))
        assert set(whole.nonzero().flatten().tolist()) == set(norms.topk(2).indices.tolist())


def test_random_supports_differ_between_matrices_and_seeds():
    model, other = dsee_model("bert", support="random"), dsee_model("bert", support="random", seed=1)
    chosen = [tuple(layer.sparse_hf_dsee_indices["default"].tolist()) for layer in layers(model).values()]
    assert len(set(chosen)) == len(chosen)
    assert all(
        not torch.equal(places(one), places(two))
        for one, two in zip(layers(model).values(), layers(other).values(), strict=True)
    )


def test_random_choices_of_a_matrix_do_not_depend_on_the_others():
    few = layers(dsee_model("bert", support="random", target_modules=["query"], stirred=False))
    many = layers(dsee_model("bert", support="random", target_modules=["key", "query"], stirred=False))
    for name, layer in few.items():
        assert torch.equal(places(layer), places(many[name]))
        assert torch.equal(layer.sparse_hf_dsee_V["default"], many[name].sparse_hf_dsee_V["default"])


def test_the_users_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = base_model("bert")
    torch.manual_seed(3)
    get_peft_model(model, dsee_config("bert", support="random", init_weights=False))
    assert torch.equal(torch.rand(3), expected)


@FAMILY
@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.95])
def test_s1_removes_exactly_the_smallest_of_the_group(family, sparsity):
    group = list(layers(dsee_model(family, base_sparsity=sparsity)).values())
    removed, stay = (torch.cat([w0(one)[kept(one) == side].abs() for one in group]) for side in (False, True))
    assert removed.numel() == round(sparsity * (removed.numel() + stay.numel()))
    assert removed.max() <= stay.min()
    assert all(torch.equal(one.weight == 0, ~one.sparse_hf_dsee_baked.mask(one.weight)) for one in group)


@FAMILY
def test_masked_modules_are_a_group_of_their_own(family):
    masked = {"bert": ["intermediate.dense"], "gpt2": r".*mlp\.c_fc", "llama": ["up_proj"]}[family]
    model = dsee_model(family, base_sparsity=0.3, masked_modules=masked)
    tuned = {name: one for name, one in layers(model).items() if "default" in one.sparse_hf_dsee_U}
    others = {name: one for name, one in layers(model).items() if name not in tuned}
    assert len(others) == 2
    for group in (tuned, others):
        total = sum(one.weight.numel() for one in group.values())
        assert sum(int((~kept(one)).sum()) for one in group.values()) == round(0.3 * total)
    assert not any(p.requires_grad for one in others.values() for p in one.parameters())
    assert all("default" not in one.sparse_hf_dsee_values for one in others.values())


@FAMILY
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_an_n_m_pattern_is_along_the_input(family, pattern):
    n, m = map(int, pattern.split(":"))
    for layer in layers(dsee_model(family, base_sparsity=0.0, base_pattern=pattern)).values():
        groups = kept(layer).reshape(layer.out_features, -1, m)
        assert (groups.sum(-1) == n).all()
        magnitudes = w0(layer).abs().reshape_as(groups)
        smallest = magnitudes.masked_fill(~groups, torch.inf).amin(-1)
        assert (smallest >= magnitudes.masked_fill(groups, 0).amax(-1)).all()


def test_a_second_adapter_chooses_by_w0_while_the_first_masks_it():
    model = dsee_model("bert", base_sparsity=0.9)
    model.add_adapter("other", dsee_config("bert", base_sparsity=0.3, nnz=500))
    alone = dsee_model("bert", base_sparsity=0.3, nnz=500)
    for one, two in zip(layers(model).values(), layers(alone).values(), strict=True):
        assert torch.equal(one.sparse_hf_dsee_mask["other"], two.sparse_hf_dsee_mask["default"])
        assert torch.equal(places(one, "other"), places(two))


def test_a_fingerprint_is_of_the_base_and_of_nothing_else():
    def found(seed=0, half=False, **changes):
        base = base_model("bert", seed=seed)
        model = get_peft_model(base.bfloat16() if half else base, dsee_config("bert", **changes))
        return stir(model).peft_config["default"].to_dict()["base_fingerprint"]

    assert found() == found(r=4, support="random", base_sparsity=0.7) == found(half=True)
    assert found() != found(seed=1)
    assert len(found()) == 64


def test_a_second_adapter_notes_the_same_base():
    model = dsee_model("bert")
    model.add_adapter("other", dsee_config("bert"))
    first, second = (model.peft_config[name].to_dict()["base_fingerprint"] for name in ("default", "other"))
    assert first == second
