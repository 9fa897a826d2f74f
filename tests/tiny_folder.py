"""A tiny BERT classifier with its tokenizer, on disk, and a tiny sentiment task, for tests of whole commands."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast


WORDS = ("good", "bad", "fine", "poor", "film", "plot", "a", "the")


def save_tiny_model(folder: Path) -> Path:
    """Write a two-layer BERT of width 16 with a word-level tokenizer."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def save_tiny_task(folder: Path, rows: int = 32) -> tuple[Path, Path]:
    """Write training and validation files of labelled sentences (.jsonl)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        label = number % 2
        adjective = ("bad", "poor")[number // 2 % 2] if label == 0 else ("good", "fine")[number // 2 % 2]
        lines.append(json.dumps({"sentence": f"the {adjective} {WORDS[4 + number // 4 % 2]}", "label": label}))
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path in paths:
        path.write_text("\n".join(lines) + "\n")
    return paths
