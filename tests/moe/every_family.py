"""A tiny random model of every stock family with mixtures of experts, made from its config in a few milliseconds."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf.moe.modeling_mixture import MODEL_TYPE
from sparse_hf.moe.router_logits import EXPERT_COUNTS


STOCK_FAMILIES = tuple(one for one in EXPERT_COUNTS if not one.startswith(MODEL_TYPE))
EXPERTS = 4
# Two layers, each with four experts, two per token; what a family does not know, it does not look at.
CONFIG = dict(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    shared_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    pad_token_id=0,
    eos_token_id=2,
    first_k_dense_replace=0,
    num_dense_layers=0,
    moe_layer_start_index=0,
    layer_types=["full_attention"] * 2,
    mlp_only_layers=[],
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
)
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = {"ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}


def every_family(model_type: str, **changes: object) -> PreTrainedModel:
    """The model, in eval mode, with router weights so large that routing matters."""
    counts = dict.fromkeys(COUNTS if model_type != "qwen3_moe" else ("num_experts",), EXPERTS)
    config = {**CONFIG, **counts, TOP_K.get(model_type, "num_experts_per_tok"): 2, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and len(parameter) == EXPERTS and ("gate" in name or "router" in name):
                    parameter.normal_()
    return model
