"""A dense checkpoint becomes a mixture of experts that stock Transformers loads and that computes the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM

from sparse_hf.moe import upcycle as upcycling
from sparse_hf.moe.densify import densify
from sparse_hf.moe.upcycle import plan_upcycling, upcycle
from tiny_models import tiny_inputs, tiny_model
from whole_models import largest_difference


TARGETS = {"llama": MixtralForCausalLM, "mistral": MixtralForCausalLM, "qwen3": Qwen3MoeForCausalLM}


def save_dense(folder, family="llama", dtype=torch.float32, **changes):
    model = tiny_model(family, "causal_lm", **changes).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return model


def quiet(source, destination, **options):
    return upcycle(source, destination, **{"experts": 4, "check_tokens": 32, "progress": False, **options})


def logits(model, like):
    with torch.no_grad():
        return model(**tiny_inputs(like, batch=3, length=12)).logits


@pytest.mark.parametrize("router_std", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("family", TARGETS)
def test_the_function_is_kept(tmp_path, family, router_std):
    dense = save_dense(tmp_path / "dense", family)
    quiet(tmp_path / "dense", tmp_path / "moe", router_std=router_std)
    mixture, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert type(mixture) is TARGETS[family]
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(dense, dense)
    assert (logits(mixture, dense) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", TARGETS)
def test_names_on_disk_are_those_the_stock_class_writes(tmp_path, family):
    save_dense(tmp_path / "dense", family)
    quiet(tmp_path / "dense", tmp_path / "moe")
    ours = load_file(tmp_path / "moe" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"head_dim": 16}, {"sliding_window": 4}])
def test_what_families_vary(tmp_path, changes):
    family = "mistral" if "sliding_window" in changes else "llama"
    dense = save_dense(tmp_path / "dense", family, **changes)
    quiet(tmp_path / "dense", tmp_path / "moe")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert torch.allclose(logits(mixture, dense), logits(dense, dense), atol=1e-5)
    for name, value in changes.items():
        assert getattr(mixture.config, name) == value


@pytest.mark.parametrize("stored", [False, True])
def test_untied_embeddings_pass_the_check_and_come_back_as_they_are(tmp_path, stored):
    save_dense(tmp_path / "dense", tie_word_embeddings=True)
    if stored:  # other ones, which Transformers takes although the config says that they are tied
        file = tmp_path / "dense" / "model.safetensors"
        weights = load_file(file)
        save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    quiet(tmp_path / "dense", tmp_path / "moe", untie=True)
    densify(tmp_path / "moe", tmp_path / "back", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for folder in ("moe", "back"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert not model.config.tie_word_embeddings
        assert torch.allclose(logits(model, dense), logits(dense, dense), atol=1e-5)


def test_special_tokens_that_the_source_lacks_are_not_invented(tmp_path):
    save_dense(tmp_path / "dense", eos_token_id=None, bos_token_id=None)
    quiet(tmp_path / "dense", tmp_path / "moe")
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.eos_token_id, config.bos_token_id) == (None, None)


def test_generation_is_the_same(tmp_path):
    dense = save_dense(tmp_path / "dense")
    quiet(tmp_path / "dense", tmp_path / "moe")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    ids = tiny_inputs(dense)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(mixture.generate(input_ids=ids, **options), dense.generate(input_ids=ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_are_copied_in_their_dtype(tmp_path, dtype):
    save_dense(tmp_path / "dense", dtype=dtype)
    quiet(tmp_path / "dense", tmp_path / "moe")
    dense, mixture = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "moe"))
    for expert in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            assert torch.equal(mixture[f"{name}.{ours}.weight"], dense[f"model.layers.1.mlp.{theirs}.weight"])
    assert {tensor.dtype for tensor in mixture.values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path / "moe").dtype == dtype


def test_some_layers_stay_dense(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen3")
    quiet(tmp_path / "dense", tmp_path / "moe", layers=[1])
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert mixture.config.mlp_only_layers == [0]
    assert torch.allclose(logits(mixture, dense), logits(dense, dense), atol=1e-5)


def test_routers_differ_by_layer_and_seed(tmp_path):
    save_dense(tmp_path / "dense")
    quiet(tmp_path / "dense", tmp_path / "a", router_std=0.5)
    quiet(tmp_path / "dense", tmp_path / "b", router_std=0.5, seed=1)
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    a, b = (load_file(tmp_path / one / "model.safetensors") for one in "ab")
    routers = [a[name.format(0)], a[name.format(1)], b[name.format(0)]]
    assert all(not torch.equal(one, other) for one, other in zip(routers, routers[1:] + routers[:1], strict=True))
    assert 0.3 < float(torch.cat(routers).std()) < 0.7


def test_training_with_the_models_own_balance_loss(tmp_path):
    save_dense(tmp_path / "dense")
    quiet(tmp_path / "dense", tmp_path / "moe")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_router_logits=True)
    ids = torch.arange(3, 19)[None]
    output = mixture(input_ids=ids, labels=ids)
    assert output.aux_loss is not None
    output.loss.backward()
    gradients = [p.grad for name, p in mixture.named_parameters() if "experts" in name]
    assert gradients
    assert all(one.abs().sum() > 0 for one in gradients)


def test_several_shards(tmp_path):
    dense = save_dense(tmp_path / "dense")
    plan = quiet(tmp_path / "dense", tmp_path / "moe", max_shard_bytes=40_000)
    assert len(plan.shards) > 2
    assert sorted(path.name for path in (tmp_path / "moe").glob("*.safetensors")) == [s.name for s in plan.shards]
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert torch.allclose(logits(mixture, dense), logits(dense, dense), atol=1e-5)


def test_the_plan_says_what_will_happen(tmp_path):
    save_dense(tmp_path / "dense")
    plan = plan_upcycling(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2)
    assert not (tmp_path / "moe").exists()
    said = str(plan)
    for part in (
        "llama -> mixtral",
        "2 of 2 layers, 4 experts, top 2",
        "Exact",
        "FLOPs per token 2.00 x dense",
        "GB free",
    ):
        assert part in said
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, check_tokens=0, progress=False)
    assert (tmp_path / "moe" / "model.safetensors").stat().st_size == plan.bytes


def test_a_folder_that_fails_the_check_does_not_load(tmp_path, monkeypatch):
    save_dense(tmp_path / "dense")
    real = upcycling.compare_layer_by_layer
    monkeypatch.setattr(upcycling, "compare_layer_by_layer", lambda *a, **k: replace(real(*a, **k), logits=0.5))
    with pytest.raises(ValueError, match="to 1e-05 of the largest, got 0.5.*left without a config"):
        quiet(tmp_path / "dense", tmp_path / "moe")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def test_the_check_sees_a_wrong_conversion(tmp_path):
    save_dense(tmp_path / "dense", "mistral", sliding_window=4)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    quiet(tmp_path / "dense", tmp_path / "moe", check_tokens=0)
    # What others write: the window is lost, everything loads.
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    target = AutoConfig.from_pretrained(tmp_path / "moe")
    assert largest_difference(tmp_path / "dense", tmp_path / "moe", target, 64, 0) > 1e-3


def test_a_damaged_source(tmp_path):
    save_dense(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.up_proj.weight` is missing"):
        quiet(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
