"""The E2E recipe on a tiny GPT-2 and a tiny table, by the command a user types."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


RECIPE = Path(__file__).parents[2] / "recipes" / "dsee_gpt2.py"
NAMES = ("Alimentum", "Cotto", "Aromi")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("e2e")
    words = ["[UNK]", "name", ":", "|", "Type", "pub", "is", "a", ".", *NAMES]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root / "model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=128)).save_pretrained(root / "model")
    rows = [f'"name[{name}], eatType[pub]","{name} is a pub."' for name in NAMES for _ in range(2)]
    (root / "e2e.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    return root


@pytest.fixture
def run(places, monkeypatch):
    def go(name: str, *more: str) -> dict:
        words = ["--model_name_or_path", places / "model", "--output_dir", places / name]
        for part in ("train", "validation", "test"):
            words += [f"--{part}_file", places / "e2e.csv"]
        words += ["--max_steps", "2", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, words), "--max_test_contexts", "2", *more])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return json.loads((places / name / "eval_results.json").read_text())

    return go


def test_two_stages(run, places):
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    found = run("two", "--sparsity", "0.5", "--nnz", "4", "--save_strategy", "no")
    assert found["trained_parameters"] == 2 * (2 * (8 + 24) + 4)
    assert found["base_sparsity"] == 0.5
    assert {"bleu", "nist", "rouge_l", "cider"} <= found.keys()
    assert len((places / "two" / "hypotheses.txt").read_text().splitlines()) == 2
    groups = (places / "two" / "references.txt").read_text().strip().split("\n\n")
    assert [len(group.splitlines()) for group in groups] == [2, 2]
    state = json.loads((places / "two" / "search.json").read_text())
    assert state["finished"]


def test_the_protocol_is_the_default(run, places):
    run("lora", "--method", "lora", "--save_strategy", "no")
    settings = torch.load(places / "lora" / "training_args.bin", weights_only=False)
    assert (settings.learning_rate, settings.seed, settings.label_smoothing_factor) == (2e-4, 110, 0.1)
    assert (settings.warmup_steps, settings.max_grad_norm, settings.adam_epsilon) == (500, 0, 1e-6)
    assert (places / "lora" / "adapter_model.safetensors").is_file()
