"""Tiny models of every family whose heads and neurons can be cut, and masks that differ from layer to layer."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.units import find_units
from tiny_models import tiny_model


# 8 query heads, of which two each share one of 4 key/value heads.
GROUPED = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=4)

# variant -> family, head and changes of `tiny_model`; every key of UNIT_TABLES is the family of at least one.
VARIANTS = {
    "bert": ("bert", "sequence_classification", {}),
    "roberta": ("roberta", "masked_lm", {}),
    "distilbert": ("distilbert", "sequence_classification", {}),
    "vit": ("vit", "image_classification", {}),
    "gpt2": ("gpt2", "causal_lm", {}),
    "llama": ("llama", "causal_lm", GROUPED),
    "llama-tied": ("llama", "causal_lm", dict(GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", "causal_lm", GROUPED),
    "qwen2": ("qwen2", "causal_lm", GROUPED),
    "qwen3": ("qwen3", "causal_lm", GROUPED),
    "t5": ("t5", "seq2seq_lm", {}),
    "t5-gated": ("t5", "base", dict(feed_forward_proj="gated-gelu")),
    "t5-encoder": ("t5", "T5EncoderModel", {}),
    "t5-encoder-gated": ("t5", "T5EncoderModel", dict(feed_forward_proj="gated-gelu")),
}

# A family that sparse_hf has no table for.
OPT_TABLE = UnitTable(
    layers="decoder.layers",
    head_projections={"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1},
    head_output="self_attn.out_proj",
    head_attributes={"self_attn": ["num_heads"]},
    neuron_projections={"fc1": 1},
    neuron_output="fc2",
)


def tiny_variant(variant: str, **changes: object) -> PreTrainedModel:
    """The tiny model of a key of `VARIANTS` with weights and biases that count: usual ones are 0.02 and zero.

    So a wrong cut shows in the output.
    """
    family, head, own_changes = VARIANTS[variant]
    model = tiny_model(family, head, **own_changes, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def ragged_masks(model: PreTrainedModel, table: UnitTable | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Masks that keep a different number of units in every layer (heads: 1 and 3 of 4), at random places."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for number, unit in enumerate(find_units(model, table)):
        keep = max(1, unit.count * (1 + 2 * (number // 2)) // 4)
        chosen = torch.randperm(unit.count, generator=generator)[:keep]
        masks[unit.key] = torch.isin(torch.arange(unit.count), chosen)
    return masks


def even_masks(model: PreTrainedModel, heads: int, neurons: int, seed: int = 0) -> dict[str, Tensor]:
    """Masks that keep the same numbers in every layer, at random places."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for unit in find_units(model):
        chosen = torch.randperm(unit.count, generator=generator)[: {"heads": heads, "neurons": neurons}[unit.kind]]
        masks[unit.key] = torch.isin(torch.arange(unit.count), chosen)
    return masks
