"""Which mixture has which router, and what a router needs to know of a batch."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from sparse_hf import RouterConfig
from sparse_hf.cli import app
from sparse_hf.moe.generic_plan import generic_config
from sparse_hf.moe.plan_upcycling import plan_upcycling
from tiny_mixtures import convert, tiny_dense
from tiny_models import tiny_config, tiny_inputs, tiny_model


CHOICE = RouterConfig("expert_choice")


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("gpt2", {"router": CHOICE}, "for encoders only, got a causal model"),
        ("vit", {"router": RouterConfig("hash"), "top_k": 1}, "needs token ids, which a vision model has not"),
        ("bert", {"router": RouterConfig("hash")}, "`top_k` must be 1, got 2"),
        ("bert", {"router": RouterConfig("expert_choice", capacity_factor=4.5)}, "at most the 4 experts, got 4.5"),
        ("bert", {"router": CHOICE, "router_std": 0.0}, "set `router_std` above 0"),
        ("bert", {"router": RouterConfig("cosine"), "router_std": 0.0}, "set `router_std` above 0"),
        ("bert", {"router": RouterConfig("cosine"), "router_rows": {}}, "has no rows to fit"),
    ],
)
def test_what_is_refused_before_anything_is_written(tmp_path, variant, options, message):
    tiny_dense(variant).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "dense", tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


def test_a_stock_architecture_has_its_own_router(tmp_path):
    tiny_model("llama", "causal_lm").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="mixtral has a router of its own.*leave it out"):
        plan_upcycling(tmp_path / "dense", tmp_path / "moe", 4, router=RouterConfig())


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("gpt2", {"router": "switch"}, "one of top_k, expert_choice, hash, cosine, got 'switch'"),
        ("gpt2", {"router": "expert_choice"}, "for encoders only"),
        ("bert", {"router": "expert_choice", "is_decoder": True}, "for encoders only"),
        ("bert", {"router": "expert_choice", "chunk_size_feed_forward": 4}, "`chunk_size_feed_forward` to be 0"),
        ("bert", {"capacity_factor": -1}, "`capacity_factor` must be above 0, got -1"),
        ("bert", {"router": "hash", "num_experts_per_tok": 1, "hash_vocab_size": 0}, "must be 1 or more, got 0"),
    ],
)
def test_a_config_that_makes_no_sense(family, entries, message):
    config = generic_config(tiny_config(family), 4, 2, frozenset([1]))
    for name, value in entries.items():
        setattr(config, name, value)
    auto = AutoModelForCausalLM if family == "gpt2" else AutoModel
    with pytest.raises(ValueError, match=message):
        auto.from_config(config)


def test_entries_changed_after_writing_do_not_load(tmp_path):
    tiny_dense("gpt2").save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", check_tokens=0)
    path = tmp_path / "moe" / "config.json"
    entries = json.loads(path.read_text())
    for changed in ({"router_bias": True}, {"router": "cosine"}, {"router": "hash", "num_experts_per_tok": 1}):
        path.write_text(json.dumps(entries | changed))
        with pytest.raises((ValueError, RuntimeError), match="must hold every weight|ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def made(router, **changes):
    config = generic_config(tiny_config("bert"), 4, 1, frozenset([0, 1]), router)
    return AutoModel.from_config(config).eval()


def test_what_a_batch_must_tell():
    model = made(CHOICE)
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match=r"`attention_mask` of shape \[2, 8\], got \[2, 1, 8, 8\]"):
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="call it, or the whole model, not a part"):
        model.encoder(torch.zeros(2, 8, 32))
    hashed = made(RouterConfig("hash"))
    with pytest.raises(ValueError, match="hash token ids, so the model needs `input_ids` of shape .2, 8., got none"):
        hashed(inputs_embeds=torch.zeros(2, 8, 32))
    with torch.no_grad():  # and goes on afterwards, whether arguments are named or not
        assert torch.equal(hashed(**inputs)[0], hashed(inputs["input_ids"], inputs["attention_mask"])[0])
        assert torch.equal(model(**inputs)[0], model(input_ids=inputs["input_ids"])[0])


def test_options_of_the_command(tmp_path):
    tiny_dense("bert").save_pretrained(tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--check-tokens", "16"]
    planned = CliRunner().invoke(app, [*words, "--plan", "--router-bias"])
    assert "router top_k" in planned.output
    assert "Exact" in planned.output
    done = CliRunner().invoke(app, [*words, "--router", "expert_choice", "--capacity-factor", "1.5"])
    assert done.exit_code == 0, done.output
    assert "FLOPs per token 1.50 x dense" in done.output.replace("\n", " ")
    assert "Not exact: tokens that no expert takes" in done.output.replace("\n", " ")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["router"], config["capacity_factor"]) == ("expert_choice", 1.5)
