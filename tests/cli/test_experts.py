"""`sparse-hf experts` from the shell: there and back again."""

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparse_hf.cli import app
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense, save_word_tokenizer


@pytest.fixture
def mixture(tmp_path):
    save_dense(tmp_path / "dense", "qwen3")
    save_word_tokenizer(tmp_path / "dense", "red green cat dog")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, check_tokens=0, progress=False)
    (tmp_path / "texts.txt").write_text("red green\n\ncat dog red\n")
    return tmp_path


def run(*words: object) -> str:
    done = CliRunner().invoke(app, ["experts", *(str(word) for word in words)])
    assert done.exit_code == 0, done.output
    return done.output


def test_measure_drop_merge_and_densify(mixture):
    usage = mixture / "usage.json"
    said = run("usage", mixture / "moe", mixture / "texts.txt", usage)
    shares = [int(share[:-1]) for share in said.split("layer 0: ")[1].splitlines()[0].split()]
    assert len(shares) == 4
    assert abs(sum(shares) - 100) <= 2
    assert "3 experts per layer" in run("drop", mixture / "moe", mixture / "drop", "--usage", usage, "--keep", "3")
    run("merge", mixture / "moe", mixture / "merge", "--usage", usage, "--groups", "2", "--by", "weights")
    run("densify", mixture / "moe", mixture / "back")
    assert AutoModelForCausalLM.from_pretrained(mixture / "drop").config.num_experts == 3
    assert AutoModelForCausalLM.from_pretrained(mixture / "merge").config.num_experts == 2
    dense, back = (mixture / name / "model.safetensors" for name in ("dense", "back"))
    assert AutoModelForCausalLM.from_pretrained(mixture / "back").config.model_type == "qwen3"
    assert dense.stat().st_size == back.stat().st_size


def test_what_does_not_fit_is_one_sentence(mixture):
    (mixture / "empty.txt").write_text("\n")
    words = ["experts", "usage", str(mixture / "moe"), str(mixture / "empty.txt"), str(mixture / "usage.json")]
    wrong = CliRunner().invoke(app, words)
    assert wrong.exit_code == 1
    assert "got 0 texts" in wrong.output.replace("\n", " ")
    words = ["experts", "densify", str(mixture / "moe"), str(mixture / "back"), "--expert", "7"]
    wrong = CliRunner().invoke(app, words)
    assert wrong.exit_code == 1
    assert not (mixture / "back" / "config.json").exists()
