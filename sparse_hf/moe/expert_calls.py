"""What are the experts of a Transformers model called with, in evaluation?

The choice is read where it is used: every block of the known families calls its experts with hidden states, chosen
experts and their weights, while what routers return differs between families and releases. (In training, and with the
logits, `router_logits.py` reads them.)
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_hf.moe.router_logits import RouterReader


@dataclass(frozen=True)
class ExpertCall:
    """One layer's call in one forward pass, padding included.

    Attributes:
        hidden: (tokens, hidden).
        chosen: integer (tokens, top_k).
        weights: of the chosen experts, (tokens, top_k).
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


def experts_by_block(model: nn.Module) -> dict[str, nn.Module]:
    """The experts of every layer, by the name of the block around them, in model order.

    Raises:
        ValueError: not a family whose routers can be read, experts that choose tokens, or training mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("Experts are measured in eval mode, got a model in training mode: call `model.eval()`.")
    if getattr(model.config, "router", None) == "expert_choice":
        raise ValueError("Experts are measured where tokens choose them, got a model whose experts choose tokens.")
    reader = RouterReader(model)
    reader.detach()
    return {name: model.get_submodule(f"{name}.experts") for name in reader.names}


@torch.no_grad()
def expert_calls(
    model: nn.Module, experts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]
) -> dict[str, ExpertCall]:
    """Run the model on one batch, without `labels`, and return what each layer's experts were called with.

    Raises:
        ValueError: experts were not called as known; what cannot be read is never left out.
    """
    calls: dict[str, list[tuple]] = {name: [] for name in experts}
    with ExitStack() as hooks:
        for name, module in experts.items():
            hook = module.register_forward_pre_hook(lambda _, arguments, name=name: calls[name].append(arguments))
            hooks.callback(hook.remove)
        model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})
    return {name: _call(name, experts[name].num_experts, called) for name, called in calls.items()}


def _call(name: str, experts: int, called: list[tuple]) -> ExpertCall:
    arguments = called[0] if len(called) == 1 else ()
    hidden, chosen, weights = arguments if len(arguments) == 3 else (None, None, None)
    fits = (
        all(isinstance(one, Tensor) and one.ndim == 2 for one in (hidden, chosen, weights))
        and chosen.dtype in (torch.int32, torch.int64)
        and weights.is_floating_point()
        and len(hidden) == len(chosen)
        and chosen.shape == weights.shape
        and bool(((chosen >= 0) & (chosen < experts)).all())
    )
    if not fits:
        raise ValueError(
            f"The experts of `{name}` must be called once with hidden states, numbers below {experts} and their "
            f"weights, for all tokens, got {len(called)} calls, or other arguments: the block is replaced, or this "
            "release of Transformers runs it in another way."
        )
    return ExpertCall(hidden, chosen, weights)
