"""Sparse training for Hugging Face Transformers: lottery tickets, pruning, sparse fine-tuning."""

import importlib

from sparse_hf.anatomy.registration import register_slim_models
from sparse_hf.hub.registration import register_compressed_checkpoints
from sparse_hf.moe.registration import register_mixture_models


__version__ = "0.1.0"

__all__ = [
    "BalanceConfig",
    "DseeConfig",
    "DseeMaskingCallback",
    "DseeMaskingConfig",
    "DseeSupportCallback",
    "DseeTwoStageConfig",
    "EarlyBirdConfig",
    "ExpertDropoutCallback",
    "ExpertInit",
    "ExpertLoadCallback",
    "GradualPruningConfig",
    "LotteryTicketConfig",
    "RouterConfig",
    "RouterSchedule",
    "RouterScheduleCallback",
    "SparseTrainer",
    "SparsityCallback",
    "StaticSparsityConfig",
    "StructuredTicket",
    "Ticket",
    "TopKSchedule",
    "TopKScheduleCallback",
    "UnitTable",
    "cut_heads",
    "densify",
    "drop_experts",
    "dsee_sparsity",
    "evaluate_top_k",
    "expert_lora_targets",
    "expert_usage",
    "export_merged",
    "find_sites",
    "find_units",
    "fit_routers",
    "get_top_k",
    "heads_by_update",
    "inspect",
    "load_slim",
    "load_usage",
    "load_with_shared_experts",
    "measure_collapse",
    "merge_experts",
    "plan_memory",
    "plot_expert_load",
    "plot_mask_distances",
    "plot_sparsity",
    "prune",
    "publish",
    "save_compressed",
    "save_dense",
    "save_usage",
    "set_top_k",
    "slim",
    "support_by_gradient",
    "upcycle",
    "usage_by_class",
    "write_card",
]

# Imported on first use, so that what a user does not need (matplotlib, typer) is not loaded.
_HOMES = {
    "BalanceConfig": "sparse_hf.moe.balance_config",
    "DseeConfig": "sparse_hf.dsee.config",
    "DseeMaskingCallback": "sparse_hf.training.dsee_masking",
    "DseeMaskingConfig": "sparse_hf.dsee.masking_config",
    "DseeSupportCallback": "sparse_hf.training.dsee_moves",
    "DseeTwoStageConfig": "sparse_hf.dsee.masking_config",
    "EarlyBirdConfig": "sparse_hf.tickets.early_bird_config",
    "ExpertDropoutCallback": "sparse_hf.training.expert_dropout",
    "ExpertInit": "sparse_hf.moe.expert_init",
    "ExpertLoadCallback": "sparse_hf.hub.expert_load_callback",
    "GradualPruningConfig": "sparse_hf.tickets.configs",
    "LotteryTicketConfig": "sparse_hf.tickets.configs",
    "RouterConfig": "sparse_hf.moe.mixture_routers",
    "RouterSchedule": "sparse_hf.moe.router_schedule",
    "RouterScheduleCallback": "sparse_hf.training.router_freezing",
    "SparseTrainer": "sparse_hf.training.trainer",
    "SparsityCallback": "sparse_hf.training.callback",
    "StaticSparsityConfig": "sparse_hf.tickets.configs",
    "StructuredTicket": "sparse_hf.tickets.structured_ticket",
    "Ticket": "sparse_hf.tickets.ticket",
    "TopKSchedule": "sparse_hf.moe.top_k_schedule",
    "TopKScheduleCallback": "sparse_hf.training.top_k_scheduling",
    "UnitTable": "sparse_hf.anatomy.modeling_slim",
    "cut_heads": "sparse_hf.dsee.cut_heads",
    "densify": "sparse_hf.moe.densify",
    "drop_experts": "sparse_hf.moe.thin_experts",
    "dsee_sparsity": "sparse_hf.dsee.model",
    "evaluate_top_k": "sparse_hf.training.top_k_scheduling",
    "expert_lora_targets": "sparse_hf.moe.shared_storage",
    "expert_usage": "sparse_hf.moe.usage",
    "export_merged": "sparse_hf.moe.export_lora",
    "find_sites": "sparse_hf.anatomy.sites",
    "find_units": "sparse_hf.anatomy.units",
    "fit_routers": "sparse_hf.moe.fit_routers",
    "get_top_k": "sparse_hf.moe.top_k",
    "heads_by_update": "sparse_hf.dsee.cut_heads",
    "inspect": "sparse_hf.cards.inspect",
    "load_slim": "sparse_hf.tickets.slim_model",
    "load_usage": "sparse_hf.moe.usage",
    "load_with_shared_experts": "sparse_hf.moe.shared_storage",
    "measure_collapse": "sparse_hf.moe.collapse_measures",
    "merge_experts": "sparse_hf.moe.thin_experts",
    "plan_memory": "sparse_hf.training.memory_plan",
    "plot_expert_load": "sparse_hf.hub.expert_load_picture",
    "plot_mask_distances": "sparse_hf.hub.mask_distance_picture",
    "plot_sparsity": "sparse_hf.hub.sparsity_picture",
    "prune": "sparse_hf.tickets.prune",
    "publish": "sparse_hf.cards.publish",
    "save_compressed": "sparse_hf.hub.save_compressed",
    "save_dense": "sparse_hf.hub.save_compressed",
    "save_usage": "sparse_hf.moe.usage",
    "set_top_k": "sparse_hf.moe.top_k",
    "slim": "sparse_hf.tickets.slim_model",
    "support_by_gradient": "sparse_hf.dsee.weight_gradients",
    "upcycle": "sparse_hf.moe.upcycle",
    "usage_by_class": "sparse_hf.moe.class_usage",
    "write_card": "sparse_hf.cards.card",
}


# Slim models, mixtures of ours and compressed checkpoints are read by `AutoModel....from_pretrained` as soon as
# sparse_hf is imported, so this cannot wait.
register_slim_models()
register_mixture_models()
register_compressed_checkpoints()

# The same holds for `PeftModel.from_pretrained` and DSEE adapters; without a working PEFT all else still works.
_NO_PEFT: ImportError | None = None
try:
    from sparse_hf.dsee.registration import register_dsee

    register_dsee()
except ImportError as error:  # not installed, or too old
    _NO_PEFT = error


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_hf' has no attribute {name!r}. It has: {', '.join(__all__)}.")
    if _NO_PEFT is not None and _HOMES[name].startswith("sparse_hf.dsee"):
        raise ImportError(f"`sparse_hf.{name}` needs PEFT ({_NO_PEFT}): run `pip install 'sparse_hf[peft]'`.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
