"""The recipe upcycles, trains both models on several domains, and tells curves and loads."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from tiny_dense import save_dense, save_word_tokenizer


COLOURS, ANIMALS = "red green blue white", "cat dog cow hen"


RECIPE = Path(__file__).parents[2] / "recipes" / "upcycle_lm.py"


def test_two_domains(tmp_path, monkeypatch, capsys):
    def run_recipe(*words):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, words)])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return capsys.readouterr().out

    save_dense(tmp_path / "dense", "llama")
    save_word_tokenizer(tmp_path / "dense", f"{COLOURS} {ANIMALS}")
    draw = np.random.default_rng(0)
    lines = {
        name: [" ".join(draw.choice(words.split(), 20)) for _ in range(60)]
        for name, words in (("a", COLOURS), ("b", ANIMALS))
    }
    (tmp_path / "a.txt").write_text("\n".join(lines["a"]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines["b"]))
    command = [
        *("--model_name_or_path", tmp_path / "dense", "--domains", f"colours={tmp_path / 'a.txt'}"),
        *(f"animals={tmp_path / 'b.jsonl'}", "--experts", "4", "--router", "fitted", "--block_size", "16"),
        *("--held_out", "8", "--max_steps", "6", "--eval_steps", "3", "--per_device_train_batch_size", "4"),
        *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", tmp_path / "out"),
    ]
    printed = run_recipe(*command)
    curve, dense = (json.loads((tmp_path / "out" / name / "curve.json").read_text()) for name in ("mixture", "dense"))
    assert [point["step"] for point in curve] == [0, 3, 6]
    # FLOPs of two copies of the FFN beside one of all else; the dense run goes on until it has spent as many.
    assert dense[-1]["step"] > 6
    assert abs(curve[0]["mean"] - dense[0]["mean"]) < 1e-4
    assert curve[-1]["mean"] < curve[0]["mean"]
    assert set(curve[0]) == {"step", "colours", "animals", "mean"}
    assert "dense, equal FLOPs" in printed
    assert printed.count("colours:") == printed.count("animals:") == 1
    assert len(printed.split("by layer: ")[1].split(",")) == 2
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "mixture")
    assert mixture.config.model_type == "mixtral"
    # Nothing is trained again.
    assert run_recipe(*command).split("Mean held-out")[1] == printed.split("Mean held-out")[1]
