"""A tiny adapter of low-rank factors per expert, as PEFT saves it."""

import json

import torch
from peft import LoraConfig, get_peft_model

from sparse_hf.moe.shared_storage import expert_lora_targets, load_with_shared_experts
from tiny_dense import save_dense


UPCYCLING = {"experts": 3, "top_k": 2, "router_std": 0.5, "seed": 3}


def save_adapter(place, family="qwen3", dtype=torch.float32, upcycling=(), **options):
    """An adapter whose every number was trained, so to speak."""
    save_dense(place / "dense", family, dtype)
    model = load_with_shared_experts(place / "dense", **{**UPCYCLING, **dict(upcycling)})
    config = {"r": 4, "lora_alpha": 12, **expert_lora_targets(model), **options}
    adapted = get_peft_model(model, LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    adapted.save_pretrained(place / "adapter")
    return adapted


def change_config(place, **entries):
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
