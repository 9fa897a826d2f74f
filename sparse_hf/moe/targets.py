"""How does each mixture-of-experts architecture say in its config and its tensor names what the dense one says?

With identical experts the output is E(x) times the sum of the chosen experts' weights. A conversion is exact where
that sum is 1 for every token: a softmax over the chosen experts (Mixtral, Granite), or scores that are renormalised
over them (`norm_topk_prob`). A shared expert, which some architectures have whether one wants it or not, must add 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


MATRICES = ("gate_proj", "up_proj", "down_proj")  # of a dense FFN

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
class SharedExpert:
    """An FFN that every token passes beside the chosen experts.

    Where it is not asked for it begins by adding exactly 0: gate and up rows are copies and its down matrix is zeros,
    so that it learns; with all three zero it could not.
    """

    tensors: Mapping[str, tuple[str, ...]] = field(
        metadata={"help": "Dense matrices, one below the other, by tensor, of {layer}."}
    )
    width: str | None = field(default=None, metadata={"help": "Entry for its neurons."})
    count: str | None = field(default=None, metadata={"help": "Entry for the same in widths of an expert."})
    gated: bool = field(default=False, metadata={"help": "Weighed by a sigmoid, which is 1/2 for a gate of zeros."})
    optional: bool = field(default=False, metadata={"help": "A width of 0 leaves it out."})
    parts: int = field(default=1, metadata={"help": "An idle one gets this part of the FFN's neurons, rounded up."})

    def idle_neurons(self, dense: int, expert: int) -> int:
        """How wide it is where it is not asked for, beside experts of `expert` neurons."""
        if self.optional:
            return 0
        return expert if self.width is None else -(-dense // self.parts)


@dataclass(frozen=True)
class Target:
    """A mixture-of-experts architecture as its own checkpoints on the Hub spell it."""

    model_type: str
    architecture: str = field(metadata={"help": "Class of the model."})
    experts: Mapping[str, tuple[str, ...]] = field(
        metadata={"help": "Dense matrices, one below the other, by tensor; without {expert} it holds all experts."}
    )
    router: str = field(metadata={"help": "Name of the router's weight, of {layer}."})
    width: str = field(metadata={"help": "Entry for an expert's neurons."})
    count: str = field(metadata={"help": "Entry for the number of experts."})
    top_k: str = field(default="num_experts_per_tok", metadata={"help": "Entry for the experts per token."})
    fixed: Mapping[str, object] = field(default_factory=dict, metadata={"help": "Entries that make it exact."})
    carried: tuple[str, ...] = field(default=DECODER_ENTRIES, metadata={"help": "Entries copied as they are."})
    rope: Mapping[str, object] = field(default_factory=dict, metadata={"help": "Changes to `rope_parameters`."})
    zeros: Mapping[str, tuple] = field(
        default_factory=dict, metadata={"help": "Shape of a tensor of zeros: numbers, 'experts' or 'hidden'."}
    )
    zeros_dtype: str | None = field(default=None, metadata={"help": "Of those; None: of the FFN."})
    shared: SharedExpert | None = None
    balance_loss: bool = field(
        default=True, metadata={"help": "Whether Transformers' class adds one with `output_router_logits`."}
    )
    remark: str = field(default="", metadata={"help": "A line for whoever reads the plan."})
    dense_layers: str | None = field(default=None, metadata={"help": "Entry that lists the layers left dense."})


_PER_EXPERT = {f"model.layers.{{layer}}.mlp.experts.{{expert}}.{matrix}.weight": (matrix,) for matrix in MATRICES}
_QWEN_ROUTER = "model.layers.{layer}.mlp.gate.weight"
_QWEN_SHARED = {f"model.layers.{{layer}}.mlp.shared_expert.{matrix}.weight": (matrix,) for matrix in MATRICES}
_SIGMOID_ROUTED = {  # DeepSeek's routing: sigmoid scores, a bias for the choice alone
    "experts": _PER_EXPERT,
    "router": _QWEN_ROUTER,
    "width": "moe_intermediate_size",
    "count": "n_routed_experts",
    "zeros": {"model.layers.{layer}.mlp.gate.e_score_correction_bias": ("experts",)},
    "zeros_dtype": "F32",
    "shared": SharedExpert(
        {f"model.layers.{{layer}}.mlp.shared_experts.{matrix}.weight": (matrix,) for matrix in MATRICES},
        count="n_shared_experts",
    ),
    "balance_loss": False,
}
_SIGMOID_FIXED = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}

MIXTRAL = Target(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    experts={
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": ("gate_proj",),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": ("down_proj",),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": ("up_proj",),
    },
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    width="intermediate_size",
    count="num_local_experts",
)
QWEN3_MOE = Target(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="moe_intermediate_size",
    count="num_experts",
    carried=(*DECODER_ENTRIES, "intermediate_size", "attention_bias"),
    fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None},
    dense_layers="mlp_only_layers",
)
QWEN2_MOE = Target(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="moe_intermediate_size",
    count="num_experts",
    carried=(*DECODER_ENTRIES, "intermediate_size"),
    fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False, "qkv_bias": True},
    zeros={"model.layers.{layer}.mlp.shared_expert_gate.weight": (1, "hidden")},
    # An eighth: it costs every token, and a width of 0 has no place in an engine's tensors.
    shared=SharedExpert(_QWEN_SHARED, "shared_expert_intermediate_size", gated=True, parts=8),
    dense_layers="mlp_only_layers",
)
QWEN3_5_MOE = Target(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="moe_intermediate_size",
    count="num_experts",
    carried=(
        *DECODER_ENTRIES,
        "attention_bias",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "layer_types",
    ),
    zeros={"model.layers.{layer}.mlp.shared_expert_gate.weight": (1, "hidden")},
    shared=SharedExpert(_QWEN_SHARED, "shared_expert_intermediate_size", gated=True, parts=8),
)
GLM4_MOE = Target(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    **_SIGMOID_ROUTED,
    carried=(*DECODER_ENTRIES, "intermediate_size"),
    # Half of each head is rotated by default; engines look for the factor in either place.
    fixed={**_SIGMOID_FIXED, "num_mtp_layers": 0, "partial_rotary_factor": 1.0},
    rope={"partial_rotary_factor": 1.0},
)
DOTS1 = Target(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    **_SIGMOID_ROUTED,
    carried=(*DECODER_ENTRIES, "intermediate_size", "attention_bias"),
    fixed={**_SIGMOID_FIXED, "sliding_window": None},
)
_GRANITE_ENTRIES = (
    *DECODER_ENTRIES,
    "attention_bias",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
GRANITE_MOE = Target(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    experts={
        "model.layers.{layer}.block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
        "model.layers.{layer}.block_sparse_moe.output_linear.weight": ("down_proj",),
    },
    router="model.layers.{layer}.block_sparse_moe.router.layer.weight",
    width="intermediate_size",
    count="num_local_experts",
    carried=_GRANITE_ENTRIES,
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    shared=SharedExpert(
        {
            "model.layers.{layer}.shared_mlp.input_linear.weight": ("gate_proj", "up_proj"),
            "model.layers.{layer}.shared_mlp.output_linear.weight": ("down_proj",),
        },
        "shared_intermediate_size",
        optional=True,
    ),
)
FLEX_OLMO = Target(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="intermediate_size",
    count="num_experts",
    carried=(*DECODER_ENTRIES, "attention_bias"),
    fixed={"norm_topk_prob": True},
)
ERNIE4_5_MOE = Target(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="moe_intermediate_size",
    count="moe_num_experts",
    top_k="moe_k",
    carried=(*DECODER_ENTRIES, "intermediate_size"),
    fixed={"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 1, "use_bias": False},
    zeros={"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias": (1, "experts")},
    zeros_dtype="F32",
)
HUNYUAN_V1_MOE = Target(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    experts=_PER_EXPERT,
    router="model.layers.{layer}.mlp.gate.wg.weight",
    width="intermediate_size",
    count="num_experts",
    top_k="moe_topk",
    carried=(*DECODER_ENTRIES, "attention_bias", "eod_token_id"),
    shared=SharedExpert({f"model.layers.{{layer}}.mlp.shared_mlp.{matrix}.weight": (matrix,) for matrix in MATRICES}),
    balance_loss=False,
)
LFM2_MOE = Target(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    experts={
        "model.layers.{layer}.feed_forward.experts.{expert}.w1.weight": ("gate_proj",),
        "model.layers.{layer}.feed_forward.experts.{expert}.w2.weight": ("down_proj",),
        "model.layers.{layer}.feed_forward.experts.{expert}.w3.weight": ("up_proj",),
    },
    router="model.layers.{layer}.feed_forward.gate.weight",
    width="moe_intermediate_size",
    count="num_experts",
    carried=(*DECODER_ENTRIES, "intermediate_size", "norm_eps", "conv_bias", "conv_L_cache", "layer_types"),
    fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_dense_layers": 0, "use_expert_bias": True},
    zeros={"model.layers.{layer}.feed_forward.expert_bias": ("experts",)},
    zeros_dtype="F32",
    balance_loss=False,
    remark="lfm2_moe divides the chosen scores by their sum + 1e-6, so each FFN's output is smaller by about 1e-6.\n",
)
COHERE2_MOE = Target(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    experts=_PER_EXPERT,
    router=_QWEN_ROUTER,
    width="intermediate_size",
    count="num_experts",
    carried=(
        *DECODER_ENTRIES,
        "attention_bias",
        "layer_norm_eps",
        "logit_scale",
        "sliding_window",
        "layer_types",
    ),
    fixed={"norm_topk_prob": True, "num_shared_experts": 0, "expert_selection_fn": "softmax"},
    balance_loss=False,
)
