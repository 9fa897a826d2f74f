"""`sparse-hf upcycle` from the shell."""

import json

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparse_hf.cli import app
from tiny_dense import save_dense, save_word_tokenizer
from tiny_models import tiny_model


def test_plan_write_and_refuse(tmp_path):
    tiny_model("llama", "causal_lm").save_pretrained(tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--check-tokens", "16"]
    planned = CliRunner().invoke(app, [*words, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "llama -> mixtral" in planned.output
    assert not (tmp_path / "moe").exists()
    other = CliRunner().invoke(app, [*words, "--plan", "--target", "glm4_moe"])
    assert "llama -> glm4_moe" in other.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "logits equal on 16 tokens" in done.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_local_experts == 4
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "holds a model already" in again.output


def test_untied(tmp_path):
    save_dense(tmp_path / "dense", "qwen3", tie_word_embeddings=True)
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "2", "--check-tokens", "16"]
    done = CliRunner().invoke(app, [*words, "--untie"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["tie_word_embeddings"] is False


def test_parts_layers_and_branches_by_options(tmp_path):
    for seed, name in enumerate(("dense", "branch")):
        save_dense(tmp_path / name, "qwen3", seed=seed)
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "2", "--check-tokens", "16"]
    parts = CliRunner().invoke(app, [*words, "--plan", "--granularity", "4", "--top-k", "4", "--layers", "every-2"])
    assert "1 of 2 layers, 8 experts, top 4" in parts.output
    done = CliRunner().invoke(app, [*words, "--branch", str(tmp_path / "branch"), "--average"])
    assert done.exit_code == 0, done.output
    assert "Not exact: experts come from 1 models" in done.output
    assert "of the largest on 16 tokens" in done.output


def test_routers_fitted_to_a_file(tmp_path):
    save_dense(tmp_path / "dense", "qwen3")
    save_word_tokenizer(tmp_path / "dense", "red green cat dog")
    samples = tmp_path / "samples.json"
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--router-samples", str(samples)]
    for content in ('["red"]', '{"colours": "red"}'):
        samples.write_text(content)
        wrong = CliRunner().invoke(app, words)
        assert wrong.exit_code == 1
        assert "must hold texts by domain" in wrong.output.replace("\n", " ")
    samples.write_text(json.dumps({"colours": ["red green"], "animals": ["cat dog"]}))
    done = CliRunner().invoke(app, [*words, "--check-tokens", "16"])
    assert done.exit_code == 0, done.output
    assert "told apart by layer 1.00, 1.00, chance 0.50" in done.output.replace("\n", " ")
