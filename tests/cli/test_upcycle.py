"""`sparse-hf upcycle` from the shell."""

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparse_hf.cli import app
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
