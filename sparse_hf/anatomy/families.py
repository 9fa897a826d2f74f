"""Facts about the models of Transformers that their modules do not tell by themselves.

Facts are keyed by the names of classes, attributes and modules and not by `config.model_type`, because a model may
hold several families (a vision tower, a text decoder), and because most families repeat the same few names.
Checked against the sources of Transformers 5.17 and 5.23.
"""

# Class names below hold for a module of that class or of one that inherits from it (FSDP2 makes subclasses).

# Modules that only wrap another one: class -> attribute that holds it. That attribute disappears from canonical names.
WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",  # peft: LoraModel and the like
    "BaseTunerLayer": "base_layer",  # peft: the adapted layer inside its adapter
}

# peft: the adapter's own weights, by the start of one component of their name.
ADAPTER_PREFIXES = ("lora_", "sparse_hf_dsee_")

# Task heads of the pretrained models that have no base model module beside them and do not call the head output
# embeddings: T5ForQuestionAnswering, MT5 and UMT5; CLIPForImageClassification, Siglip and MetaCLIP 2.
HEADS_WITHOUT_BASE = ("qa_outputs", "classifier")

# Linear layers that are relative position embeddings, by a component of their name: LayoutLMv2 and v3; Swin v2.
RELATIVE_POSITIONS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias", "continuous_position_bias_mlp")

# Routers, by a part of the class name. All of: MixtralTopKRouter, Qwen2MoeTopKRouter, Qwen3MoeTopKRouter,
# OlmoeTopKRouter, GptOssTopKRouter, DeepseekV2TopkRouter, DeepseekV3TopkRouter, GraniteMoeTopKRouter,
# PhimoeTopKRouter, SwitchTransformersTop1Router, DbrxRouter, Llama4Router (the latter an nn.Linear), ...;
# JetMoeTopKGating; HunYuanMoEV1Gate (which holds `wg`).
ROUTER_CLASSES = ("Router", "TopKGating", "MoEV1Gate")

# Routers that are a plain nn.Linear, by attribute: Qwen2-MoE, Qwen3-Next and relatives weigh their shared expert with
# `shared_expert_gate`; Doge has `router_gate`, Gemma3n `modality_router`; `router` is what others call it.
ROUTER_ATTRIBUTES = ("router", "router_gate", "modality_router", "shared_expert_gate")

# ... and `gate`, but only beside `experts` (modelling code on the Hub): D-FINE has another `gate`.
ROUTER_BESIDE_EXPERTS = "gate"

# Modules whose 3-D parameters are one matrix per expert, by a part of the class name: MixtralExperts,
# Qwen3MoeExperts, OlmoeExperts, DeepseekV3Experts, GraniteMoeExperts, PhimoeExperts, JetMoeParallelExperts, ...
# The matrices are (experts, out, in), unless ...
EXPERT_CLASSES = ("Experts",)

# ... the class is one of these: (experts, in, out). Classes under `use_experts_implementation` say it themselves, in
# their attribute `is_transposed`; Llama 4 and the Aria of 5.17 are not under it.
TRANSPOSED_EXPERT_CLASSES = (
    "GptOssExperts",
    "OpenAIPrivacyFilterExperts",
    "AriaExperts",
    "AriaGroupedExpertsGemm",
    "Llama4TextExperts",
)

# 2-D matrices other than the `weight` of an nn.Linear or a Conv1D: class -> attribute -> whether stored as (in, out).
# DBRX stacks its experts along the first axis of 2-D parameters; they are taken whole, like a fused qkv.
OTHER_MATRICES = {
    "MultiheadAttention": {"in_proj_weight": False},  # of torch.nn: Siglip's pooling head, OneFormer, BridgeTower
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
}

# Parameters that hold packed integers whatever their dtype says (bitsandbytes), by class name.
QUANTISED_PARAMETERS = ("Params4bit", "Int8Params")
