"""What do the routers of a generic mixture of experts consist of when it is written?"""

import math

import numpy as np
from transformers import PreTrainedConfig

from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.mixture_routers import TEMPERATURE, RouterConfig, cosine_size, hash_table
from sparse_hf.moe.router_init import Router, router_tensor
from sparse_hf.storage.pieces import DrawNormal, FillZeros, GivenBytes
from sparse_hf.storage.shard_plan import PlannedTensor


def router_tensors(name: str, layer: int, mixture: Mixture, config: PreTrainedConfig) -> list[PlannedTensor]:
    """All of a router, float32, or the table of a hash.

    Args:
        name: of the router.
        config: of the dense model.

    Raises:
        ValueError: the start is not one that this kind can have.
    """
    routing, start, experts = mixture.routing or RouterConfig(), mixture.router, mixture.experts
    hidden, vocabulary = config.hidden_size, getattr(config, "vocab_size", None)
    _check_start(routing, start)
    if routing.kind == "hash":
        table = hash_table(vocabulary, experts, layer, start.seed).numpy().astype("<i2")
        return [PlannedTensor(f"{name}.table", "I16", (vocabulary,), (GivenBytes(table.tobytes()),))]
    bias = [PlannedTensor(f"{name}.selection_bias", "F32", (experts,), (FillZeros(4 * experts),))] * routing.bias
    if routing.kind != "cosine":
        return [router_tensor(f"{name}.weight", layer, start, "F32", hidden, experts, 1), *bias]
    size = routing.size or cosine_size(experts)
    temperature = np.full(1, math.log(TEMPERATURE), "<f4").tobytes()
    return [
        _normal(f"{name}.projection", (size, hidden), start, layer),
        _normal(f"{name}.weight", (experts, size), start, layer),
        PlannedTensor(f"{name}.log_temperature", "F32", (1,), (GivenBytes(temperature),)),
        *bias,
    ]


def _normal(name: str, shape: tuple[int, int], start: Router, layer: int) -> PlannedTensor:
    key = f"{start.seed}/router/{layer}/{name.rpartition('.')[2]}"
    return PlannedTensor(name, "F32", shape, (DrawNormal(math.prod(shape), start.std, "F32", key),))


def _check_start(routing: RouterConfig, start: Router) -> None:
    if start.rows is not None and routing.kind in ("hash", "cosine"):
        raise ValueError(f"A router of kind {routing.kind!r} has no rows to fit: leave `router_rows` out.")
    if start.std == 0 and start.rows is None and routing.kind in ("cosine", "expert_choice"):
        raise ValueError(
            f"Routers of kind {routing.kind!r} cannot begin with zeros, which point nowhere and have all experts "
            "take the same tokens: set `router_std` above 0."
        )


def changes_function(routing: RouterConfig, experts: int, top_k: int) -> str | None:
    """Why a mixture of identical experts does not compute what the dense model does; None if it does."""
    by_experts = routing.kind == "expert_choice"
    if ((by_experts and routing.capacity_factor) or top_k) == experts:  # every expert for every token
        return None
    if not routing.norm_topk_prob:
        return "the weights of a token's experts do not sum to 1"
    if by_experts:
        return "tokens that no expert takes pass by the residual connection alone"
    return None
