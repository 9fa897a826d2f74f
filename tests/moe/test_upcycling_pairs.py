"""Every pair of the table: the mixture that plain Transformers loads computes what the dense model computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import DENSE, LLAMA3, save_dense
from whole_models import largest_difference


ALL = [(source, pair.target) for source, pairs in PAIRS.items() for pair in pairs]
IDS = [f"{source}-{target.model_type}" for source, target in ALL]


def logits(model):
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def quiet(source, destination, **options):
    return upcycle(source, destination, **{"experts": 4, "check_tokens": 0, "progress": False, **options})


def difference(tmp_path, family, target, untie=False, **changes):
    dense = save_dense(tmp_path / "dense", family, **changes)
    quiet(tmp_path / "dense", tmp_path / "moe", target=target.model_type, router_std=0.5, untie=untie)
    mixture, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert type(mixture).__name__ == target.architecture
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(dense)
    return float((logits(mixture) - expected).abs().max() / expected.abs().max())


# Entries that are easy to leave out: everything loads without them, and something else is computed.
NEEDED = [
    ("ministral3", "mixtral", {"sliding_window": None}),
    ("phi3", "mixtral", {"sliding_window": None}),
    ("qwen2", "qwen2_moe", {"norm_topk_prob": False}),
    ("qwen3", "qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3", "dots1", {"norm_topk_prob": False}),
    ("llama", "glm4_moe", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}),
    ("olmo2", "flex_olmo", {"rms_norm_eps": 0.1}),  # its norm after the FFN makes good for `norm_topk_prob`
    ("granite", "granitemoe", {"residual_multiplier": 1.0}),
    ("granite", "granitemoe", {"attention_multiplier": 1.0}),
    ("cohere2", "cohere2_moe", {"layer_types": ["full_attention", "full_attention"]}),
    ("lfm2", "lfm2_moe", {"norm_topk_prob": False}),
]


def test_every_family_is_tested():
    assert set(DENSE) == set(PAIRS)


@pytest.mark.parametrize(("family", "target"), ALL, ids=IDS)
def test_the_function_is_kept(tmp_path, family, target):
    assert difference(tmp_path, family, target) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "target"), ALL, ids=IDS)
def test_untied_embeddings_are_two_and_compute_the_same(tmp_path, family, target, tied):
    assert difference(tmp_path, family, target, untie=True, tie_word_embeddings=tied) <= 1e-5
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    first, last = mixture.get_input_embeddings().weight, mixture.get_output_embeddings().weight
    assert not mixture.config.tie_word_embeddings
    assert first.data_ptr() != last.data_ptr()
    assert "lm_head.weight" in load_file(tmp_path / "moe" / "model.safetensors")
    assert torch.equal(first, last) == tied


@pytest.mark.parametrize(("family", "target"), ALL, ids=IDS)
def test_names_on_disk_are_those_the_stock_class_writes(tmp_path, family, target):
    save_dense(tmp_path / "dense", family)
    quiet(tmp_path / "dense", tmp_path / "moe", target=target.model_type)
    ours = load_file(tmp_path / "moe" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("family", "target"), [one for one in ALL if one[0] != "granite"])  # 5.17 fails with its own
def test_the_plan_knows_who_has_a_balance_loss(tmp_path, family, target):
    save_dense(tmp_path / "dense", family)
    plan = quiet(tmp_path / "dense", tmp_path / "moe", target=target.model_type)
    plan.config.output_router_logits = True  # not an argument: 5.17 does not know it for all of them
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", config=plan.config)
    ids = torch.arange(3, 19)[None]
    has_one = getattr(mixture(input_ids=ids, labels=ids), "aux_loss", None) is not None
    assert has_one == target.balance_loss
    assert ("turns the model's own on" in str(plan)) == has_one


@pytest.mark.parametrize(("family", "target", "wrong"), NEEDED)
def test_the_entries_that_make_it_exact(tmp_path, family, target, wrong):
    save_dense(tmp_path / "dense", family)
    plan = quiet(tmp_path / "dense", tmp_path / "moe", target=target, router_std=0.5)
    assert largest_difference(tmp_path / "dense", tmp_path / "moe", plan.config, 48, 0) <= 1e-5
    changed = type(plan.config)(**{**plan.config.to_dict(), **wrong})
    assert largest_difference(tmp_path / "dense", tmp_path / "moe", changed, 48, 0) > 1e-3


@pytest.mark.parametrize(("family", "target"), [("qwen2", "qwen2_moe"), ("qwen3", "glm4_moe")])
def test_a_shared_expert_adds_nothing_and_learns(tmp_path, family, target):
    dense = save_dense(tmp_path / "dense", family)
    plan = quiet(tmp_path / "dense", tmp_path / "moe", target=target, check_tokens=32)
    parts = plan.pair.target.shared.parts
    assert f"{target} has a shared expert" in str(plan)
    assert f"FLOPs per token {2 + 1 / parts:.2f} x dense" in str(plan)
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    shared = {name.split("shared_expert")[1]: p for name, p in mixture.named_parameters() if "layers.1.mlp.sh" in name}
    gate, down = (next(p for name, p in shared.items() if f"{one}_proj" in name) for one in ("gate", "down"))
    assert torch.equal(gate, dense.model.layers[1].mlp.gate_proj.weight[: 64 // parts])
    assert not down.any()
    ids = torch.arange(3, 19)[None]
    mixture(input_ids=ids, labels=ids).loss.backward()
    assert down.grad.abs().sum() > 0


def test_a_score_bias_stays_fp32(tmp_path):
    save_dense(tmp_path / "dense", "llama", torch.bfloat16)
    quiet(tmp_path / "dense", tmp_path / "moe", target="glm4_moe", check_tokens=32)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "moe" / "model.safetensors").items()}
    biases = {name for name in dtypes if "e_score_correction_bias" in name}
    assert {dtypes.pop(name) for name in biases} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}


def test_generation_with_a_shared_expert(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen2")
    quiet(tmp_path / "dense", tmp_path / "moe")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    ids = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(mixture.generate(input_ids=ids, **options), dense.generate(input_ids=ids, **options))


def test_qwen2_layers_can_stay_dense(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen2")
    quiet(tmp_path / "dense", tmp_path / "moe", layers=[1])
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert mixture.config.mlp_only_layers == [0]
    assert torch.allclose(logits(mixture), logits(dense), atol=1e-5)


def test_rows_that_do_not_divide(tmp_path):
    save_dense(tmp_path / "dense", "phi3")
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must divide as \[4, 2, 2\], got \[63, 32\]"):
        quiet(tmp_path / "dense", tmp_path / "moe")


@pytest.mark.parametrize("damage", [lambda up: up.bfloat16(), lambda up: up[:-1].clone(), lambda up: up.flatten()])
def test_matrices_that_do_not_belong_together(tmp_path, damage):
    save_dense(tmp_path / "dense", "granite")
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: damage(weights[name])}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"of layer 1 must be \[neurons, hidden\] twice"):
        quiet(tmp_path / "dense", tmp_path / "moe")
