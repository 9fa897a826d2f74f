"""Which dense architecture computes the same as which mixture-of-experts architecture, and what must be checked?

With identical experts the output is E(x) times the sum of the chosen experts' weights. A conversion is exact where
that sum is 1 for every token: a softmax over the chosen experts (Mixtral), or one that is renormalised over them
(`norm_topk_prob`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedConfig


# Entries of a decoder's config that mean the same on both sides.
DECODER_ENTRIES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)


@dataclass(frozen=True)
class Pair:
    """A dense `model_type` and the mixture of experts that it becomes."""

    source: str
    target: str
    architecture: str = field(metadata={"help": "Class of the target."})
    expert: str = field(metadata={"help": "Name of an expert's matrix, of {layer}, {expert} and {matrix}."})
    matrices: Mapping[str, str] = field(metadata={"help": "The target's name of the matrix, by the source's."})
    router: str = field(metadata={"help": "Name of the router's weight, of {layer}."})
    width: str = field(metadata={"help": "Entry of the target's config for an expert's neurons."})
    experts: str = field(metadata={"help": "Entry of the target's config for the number of experts."})
    carried: tuple[str, ...] = field(default=DECODER_ENTRIES, metadata={"help": "Entries copied as they are."})
    fixed: Mapping[str, object] = field(default_factory=dict, metadata={"help": "Entries that make it exact."})
    required: Mapping[str, tuple] = field(
        default_factory=dict, metadata={"help": "Values that entries of the source must have, and why."}
    )
    dense_layers: str | None = field(default=None, metadata={"help": "Entry that lists the layers left dense."})


NO_MLP_BIAS = ((False, None), "the target's experts have no biases")
NO_ATTENTION_BIAS = ((False, None), "the target's attention has no biases")
SILU = (("silu",), "engines run experts with SiLU only")
NO_SLIDING_WINDOW = ((False, None), "windows that differ between layers were not checked")

_MIXTRAL = {
    "target": "mixtral",
    "architecture": "MixtralForCausalLM",
    "expert": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight",
    "matrices": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "width": "intermediate_size",
    "experts": "num_local_experts",
}

PAIRS = {
    "llama": Pair(
        source="llama",
        **_MIXTRAL,
        fixed={"sliding_window": None},
        required={"mlp_bias": NO_MLP_BIAS, "attention_bias": NO_ATTENTION_BIAS, "hidden_act": SILU},
    ),
    # Without its window a Mistral loads cleanly and computes something else beyond it.
    "mistral": Pair(
        source="mistral",
        **_MIXTRAL,
        carried=(*DECODER_ENTRIES, "sliding_window"),
        required={"hidden_act": SILU},
    ),
    "qwen3": Pair(
        source="qwen3",
        target="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        expert="model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight",
        matrices={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
        router="model.layers.{layer}.mlp.gate.weight",
        width="moe_intermediate_size",
        experts="num_experts",
        carried=(*DECODER_ENTRIES, "intermediate_size", "attention_bias"),
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None},
        required={"hidden_act": SILU, "use_sliding_window": NO_SLIDING_WINDOW},
        dense_layers="mlp_only_layers",
    ),
}

# Pairs that load with no missing key and compute something else.
WRONG = {
    "olmo2": "OLMo2 normalises after its blocks and OLMoE before them",
    "phi3": "Phi-3 uses RMSNorm and PhiMoE LayerNorm; Phi-3 to Mixtral needs fused projections split, not done yet",
    "glm": "GLM-4-MoE has the same parameter names and another function",
    "stablelm": "PhiMoE has the same parameter names and another function",
    "t5": "Switch Transformers multiply by the router's probability and drop tokens",
}


def pair_of(config: PreTrainedConfig) -> Pair:
    """The exact pair of a dense config.

    Raises:
        ValueError: there is none, or the source has a feature that the target cannot say; each is named.
    """
    model_type = config.model_type
    if model_type not in PAIRS:
        reason = f": {WRONG[model_type]}" if model_type in WRONG else ""
        raise ValueError(
            f"Exact mixtures of experts are known for {', '.join(PAIRS)}, got {model_type!r}{reason}. "
            "Upcycle a model of these families."
        )
    pair = PAIRS[model_type]
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("A quantised checkpoint has scales beside its weights, which are not converted: dequantise.")
    for name, (allowed, why) in pair.required.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise ValueError(
                f"A {model_type} model becomes {pair.target} only if `{name}` is {allowed[0]!r}, got {value!r}: {why}."
            )
    return pair


def target_values(
    pair: Pair, config: PreTrainedConfig, experts: int, top_k: int, dense_layers: tuple[int, ...]
) -> dict[str, object]:
    """The entries of the target's config."""
    # None too: left out, an end-of-sequence token that the source does not have would be the target's default.
    values = {name: getattr(config, name) for name in pair.carried if hasattr(config, name)}
    values |= dict(pair.fixed)
    values |= {pair.width: config.intermediate_size, pair.experts: experts, "num_experts_per_tok": top_k}
    # `output_router_logits` stays off: generation with a cache fails with it in Transformers 5.17.
    values |= {"architectures": [pair.architecture]}
    if pair.dense_layers is not None:
        values[pair.dense_layers] = list(dense_layers)
    return values
