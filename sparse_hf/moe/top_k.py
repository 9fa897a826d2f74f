"""How many experts does each token go to, and how is that changed in a model in memory?"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparse_hf.moe.modeling_mixture import FEED_FORWARDS, MODEL_TYPE
from sparse_hf.moe.router_logits import EXPERT_COUNTS, ROUTER_NAMES, RouterReader


# Which modules of a layer hold `top_k`: its router, the block around router and experts, or both.
HOLDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(EXPERT_COUNTS, ("router",)),
    **{f"{MODEL_TYPE}{family}": ("block",) for family in FEED_FORWARDS},
    **dict.fromkeys(("mixtral", "phimoe", "ernie4_5_moe"), ("block", "router")),
}
# These choose among the experts of a few groups of them, by `n_group` and `topk_group` of the config.
GROUPED = ("glm4_moe", "dots1", "deepseek_v2", "deepseek_v3")
FIXED = {"phimoe": 2}  # its routers pick a first and a second expert, whatever `top_k` says


def get_top_k(model: nn.Module) -> int:
    """Experts per token of a mixture of experts, read where it is used: in the routers or blocks.

    Args:
        model: of a family whose routers can be read, see `docs/moe_balance.md`.

    Raises:
        ValueError: another family, or not the same in all layers.
    """
    found = {vars(holder)["top_k"] for holder in _holders(model)}
    if len(found) > 1:
        raise ValueError(
            f"All layers must have the same number of experts per token, got {sorted(found)}. Call `set_top_k` first."
        )
    return found.pop()


def set_top_k(model: nn.Module, k: int) -> None:
    """Let every token go to `k` experts, in every layer, from the next forward pass on.

    The config says so too (`num_experts_per_tok`, or what the family calls it), so that a model saved afterwards is
    loaded with `k`. Weights stay as they are. Where a family does not divide the chosen experts' weights by their sum
    (`norm_topk_prob=False`), more experts also mean a larger output of the block.

    Args:
        model: of a family whose routers can be read, see `docs/moe_balance.md`.
        k: 1 to the number of experts; where routers choose among a few groups (DeepSeek, GLM-4.5, dots), to the number
            of experts in these.

    Raises:
        ValueError: another family, or another `k`; PhiMoE's routers take two experts by their construction.
    """
    holders = _holders(model)
    config, most = model.config, largest_top_k(model)
    fixed = FIXED.get(config.model_type)
    if type(k) is not int or not 1 <= k <= most or (fixed is not None and k != fixed):
        allowed = f"1 to {most}" if fixed is None else f"{fixed}, which its routers are made for"
        raise ValueError(f"`k` of this {config.model_type} model must be {allowed}, got {k!r}.")
    for holder in holders:
        holder.top_k = k
    for module in model.modules():
        if "num_experts_per_tok" in vars(module):  # heads that compute Transformers' own balance loss
            module.num_experts_per_tok = k
    config.num_experts_per_tok = k


def largest_top_k(model: nn.Module) -> int:
    """The largest `k` that `set_top_k` takes: all experts, or all of the groups that a router chooses among."""
    config = model.config
    experts = getattr(config, EXPERT_COUNTS[config.model_type])
    limited = getattr(config, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    if config.model_type in GROUPED and limited and config.n_group:
        return experts // config.n_group * config.topk_group
    return experts


@contextmanager
def top_k_of(model: nn.Module, k: int) -> Iterator[None]:
    """Inside, every token goes to `k` experts, see `set_top_k`; afterwards to as many as before."""
    before = get_top_k(model)
    set_top_k(model, k)
    try:
        yield
    finally:
        set_top_k(model, before)


def _holders(model: nn.Module) -> list[nn.Module]:
    reader = RouterReader(model)
    reader.detach()
    found = []
    for name in reader.names:
        block = model.get_submodule(name)
        router = next(child for one, child in block.named_children() if one in ROUTER_NAMES)
        # A router that PEFT wraps (`modules_to_save`) is there several times.
        places = {"block": [block], "router": list(router.modules())}
        for place in HOLDERS[model.config.model_type]:
            holders = [one for one in places[place] if "top_k" in vars(one)]
            if not holders:
                raise ValueError(
                    f"The {place} of a {model.config.model_type} model must have a `top_k`, but `{name}` has none: it "
                    "hashes, is replaced, or this release of Transformers holds it elsewhere."
                )
            found += holders
    return found
