"""Which dense architecture computes the same as which mixture-of-experts architecture, and what must be checked?"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from sparse_hf.moe.expert_init import Cut
from sparse_hf.moe.targets import (
    COHERE2_MOE,
    DOTS1,
    ERNIE4_5_MOE,
    FLEX_OLMO,
    GLM4_MOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    HUNYUAN_V1_MOE,
    LFM2_MOE,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
    Target,
)


@dataclass(frozen=True)
class Pair:
    """A dense `model_type` and a mixture of experts that it becomes."""

    source: str
    target: Target
    required: Mapping[str, tuple] = field(
        metadata={"help": "Values that entries of the source must have (a list: each of its values), and why."}
    )
    carried: tuple[str, ...] = field(default=(), metadata={"help": "Entries copied beside the target's usual ones."})
    fixed: Mapping[str, object] = field(default_factory=dict, metadata={"help": "Entries that make it exact."})
    rope_dropped: tuple[str, ...] = field(default=(), metadata={"help": "Entries of `rope_parameters` left out."})
    splits: Mapping[str, tuple] = field(
        default_factory=dict,
        metadata={"help": "Weights that are others, one below the other: their names and shares of rows."},
    )


SILU = {"hidden_act": (("silu",), "engines run experts with SiLU only")}
NO_MLP_BIAS = {"mlp_bias": ((False, None), "the target's experts have no biases")}
NO_ATTENTION_BIAS = {"attention_bias": ((False, None), "the target's attention has no such biases")}
NO_SWITCHED_WINDOW = {"use_sliding_window": ((False, None), "windows that differ between layers were not checked")}
NO_WINDOW = {"sliding_window": ((None,), "the target attends to everything")}
FULL_ROTARY = {"rope_parameters.partial_rotary_factor": ((None, 1.0), "the target is told to rotate whole heads")}

# The first of a family is its default: the one that most engines have had for longest.
PAIRS = {
    "llama": (
        Pair("llama", MIXTRAL, NO_MLP_BIAS | NO_ATTENTION_BIAS | SILU, fixed={"sliding_window": None}),
        Pair("llama", GLM4_MOE, NO_MLP_BIAS | NO_ATTENTION_BIAS | SILU | FULL_ROTARY),
    ),
    "mistral": (
        # Without its window a Mistral loads cleanly and computes something else beyond it.
        Pair("mistral", MIXTRAL, SILU, carried=("sliding_window",)),
        Pair("mistral", GLM4_MOE, SILU | NO_WINDOW | FULL_ROTARY),
    ),
    "ministral3": (
        Pair(
            "ministral3",
            MIXTRAL,
            {
                "rope_parameters.llama_4_scaling_beta": (
                    (0.0,),
                    "the target does not scale queries by their position, which these models do in long texts",
                ),
                **SILU,
            },
            carried=("sliding_window",),
            rope_dropped=("llama_4_scaling_beta", "max_position_embeddings"),
        ),
    ),
    "smollm3": (
        Pair(
            "smollm3",
            MIXTRAL,
            {
                "no_rope_layers": (
                    (1,),
                    "a layer with 0 has no rotary positions (SmolLM3-3B: every fourth), and the target's layers have",
                ),
                **NO_SWITCHED_WINDOW,
                **NO_MLP_BIAS,
                **NO_ATTENTION_BIAS,
                **SILU,
            },
            fixed={"sliding_window": None},
        ),
    ),
    "phi3": (
        Pair(
            "phi3",
            MIXTRAL,
            {
                "rope_parameters.partial_rotary_factor": ((None, 1.0), "the target rotates whole heads"),
                "rope_parameters.rope_type": (("default",), "longer contexts were not checked"),
                "resid_pdrop": ((0.0,), "the target has no such dropout"),
                "embd_pdrop": ((0.0,), "the target has no such dropout"),
                **SILU,
            },
            carried=("sliding_window",),
            rope_dropped=("partial_rotary_factor",),
            splits={
                "self_attn.qkv_proj": (
                    ("self_attn.q_proj", "num_attention_heads"),
                    ("self_attn.k_proj", "num_key_value_heads"),
                    ("self_attn.v_proj", "num_key_value_heads"),
                ),
                "mlp.gate_up_proj": (("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
            },
        ),
    ),
    "qwen2": (
        Pair("qwen2", QWEN2_MOE, NO_SWITCHED_WINDOW | SILU),
        Pair("qwen2", GLM4_MOE, NO_SWITCHED_WINDOW | SILU | FULL_ROTARY, fixed={"attention_bias": True}),
    ),
    "qwen3": (
        Pair("qwen3", QWEN3_MOE, NO_SWITCHED_WINDOW | SILU),
        Pair(
            "qwen3",
            GLM4_MOE,
            NO_SWITCHED_WINDOW | NO_ATTENTION_BIAS | SILU | FULL_ROTARY,
            fixed={"use_qk_norm": True},
        ),
        Pair("qwen3", DOTS1, NO_SWITCHED_WINDOW | SILU),
    ),
    "qwen3_5_text": (Pair("qwen3_5_text", QWEN3_5_MOE, SILU),),
    "granite": (
        Pair("granite", GRANITE_MOE, NO_MLP_BIAS | SILU),
        Pair("granite", GRANITE_MOE_SHARED, NO_MLP_BIAS | SILU),
    ),
    "olmo2": (Pair("olmo2", FLEX_OLMO, SILU),),
    "ernie4_5": (
        Pair("ernie4_5", ERNIE4_5_MOE, {"use_bias": ((False, None), "the target's experts have no biases"), **SILU}),
    ),
    "hunyuan_v1_dense": (Pair("hunyuan_v1_dense", HUNYUAN_V1_MOE, SILU),),
    "cohere2": (Pair("cohere2", COHERE2_MOE, SILU),),
    "lfm2": (
        Pair(
            "lfm2",
            LFM2_MOE,
            {},
            splits={
                "feed_forward.w1": (("mlp.gate_proj", 1),),
                "feed_forward.w2": (("mlp.down_proj", 1),),
                "feed_forward.w3": (("mlp.up_proj", 1),),
            },
        ),
    ),
}

# Targets that load with no missing key and compute something else, by source and target; None is any target.
WRONG = {
    ("olmo2", "olmoe"): "OLMo2 normalises after its blocks and OLMoE before them",
    ("phi3", "phimoe"): "Phi-3 uses RMSNorm and PhiMoE LayerNorm, and PhiMoE's two weights do not sum to 1",
    ("glm", None): "GLM-4-MoE has the same parameter names and another function",
    ("helium", None): "Mixtral has the same parameter names and another function",
    ("stablelm", None): "PhiMoE has the same parameter names and another function",
    ("exaone4", None): "EXAONE-4 normalises after its blocks and its mixture before them",
    ("t5", None): "Switch Transformers multiply by the router's probability and drop tokens",
}


def pair_of(config: PreTrainedConfig, target: str | None = None) -> Pair:
    """The exact pair of a dense config and a `target` (a `model_type`), or the family's default target.

    Raises:
        ValueError: there is none, or the source has a feature that the target cannot say; each is named.
    """
    model_type = config.model_type
    if model_type not in PAIRS:
        reason = f": {WRONG[model_type, None]}" if (model_type, None) in WRONG else ""
        raise ValueError(
            f"Exact mixtures of experts are known for {', '.join(PAIRS)}, got {model_type!r}{reason}. "
            "Upcycle a model of these families."
        )
    choices = {pair.target.model_type: pair for pair in PAIRS[model_type]}
    if target is not None and target not in choices:
        reason = f": {WRONG[model_type, target]}" if (model_type, target) in WRONG else ""
        raise ValueError(
            f"`target` of a {model_type} model must be one of {', '.join(choices)}, got {target!r}{reason}."
        )
    pair = choices[target] if target else PAIRS[model_type][0]
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("A quantised checkpoint has scales beside its weights, which are not converted: dequantise.")
    for name, (allowed, why) in pair.required.items():
        value = _entry(config, name)
        if any(one not in allowed for one in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"A {model_type} model becomes {pair.target.model_type} only if `{name}` is {allowed[0]!r}, "
                f"got {reprlib.repr(value)}: {why}."
            )
    return pair


def target_values(
    pair: Pair, config: PreTrainedConfig, cut: Cut, top_k: int, dense_layers: tuple[int, ...]
) -> dict[str, object]:
    """The entries of the target's config; widths are cut of the tensors, since not every config says them outright."""
    target = pair.target
    # None too: left out, an end-of-sequence token that the source does not have would be the target's default.
    values = {name: getattr(config, name) for name in (*target.carried, *pair.carried) if hasattr(config, name)}
    # Written out, because defaults of targets and engines differ.
    values["head_dim"] = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    rope = {name: value for name, value in values["rope_parameters"].items() if name not in pair.rope_dropped}
    values["rope_parameters"] = rope | dict(target.rope)
    values |= dict(target.fixed) | dict(pair.fixed)
    values |= {target.width: cut.width, target.count: cut.parts, target.top_k: top_k}
    # `output_router_logits` stays off: generation with a cache fails with it in Transformers 5.17.
    values |= {"architectures": [target.architecture]}
    shared = target.shared
    if shared is not None:
        entries = {shared.width: cut.shared, shared.count: cut.shared_parts}
        values |= {name: value for name, value in entries.items() if name is not None}
    if target.dense_layers is not None:
        values[target.dense_layers] = list(dense_layers)
    return values


def _entry(config: PreTrainedConfig, name: str) -> object:
    """An entry, or a part of one after a dot; None if there is none."""
    first, _, rest = name.partition(".")
    value = getattr(config, first, None)
    return value.get(rest) if rest and isinstance(value, dict) else value
