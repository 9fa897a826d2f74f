"""Tiny dense models of the families without a mixture-of-experts sibling, and their conversion on disk."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_hf.moe.upcycle import upcycle
from tiny_models import tiny_model


GATED = dict(feed_forward_proj="gated-gelu")
# variant -> family, head and changes of `tiny_model`, auto class
VARIANTS = {
    "gpt2": ("gpt2", "causal_lm", {}, "AutoModelForCausalLM"),
    "gpt2-base": ("gpt2", "base", {}, "AutoModel"),
    "gpt2-untied": ("gpt2", "causal_lm", dict(tie_word_embeddings=False), "AutoModelForCausalLM"),
    "bert": ("bert", "masked_lm", {}, "AutoModelForMaskedLM"),
    "bert-base": ("bert", "base", {}, "AutoModel"),
    "roberta": ("roberta", "sequence_classification", {}, "AutoModelForSequenceClassification"),
    "vit": ("vit", "image_classification", {}, "AutoModelForImageClassification"),
    "vit-base": ("vit", "base", {}, "AutoModel"),
    "t5": ("t5", "T5EncoderModel", {}, "AutoModel"),
    "t5-gated": ("t5", "T5EncoderModel", GATED, "AutoModelForTextEncoding"),
    "t5-tokens": ("t5", "token_classification", GATED, "AutoModelForTokenClassification"),
}


def tiny_dense(variant: str, **changes: object) -> PreTrainedModel:
    """The tiny model of a key of `VARIANTS` with weights and biases that count: usual ones are 0.02 and zero."""
    family, head, own_changes, _ = VARIANTS[variant]
    model = tiny_model(family, head, **own_changes, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def convert(source: Path, destination: Path, **options: object) -> PreTrainedConfig:
    """Write a mixture with random routers and have it checked."""
    return upcycle(source, destination, **{"experts": 4, "router_std": 0.5, "progress": False, **options}).config
