"""The bias that changes which experts a token goes to, and not their weights, where a family has one.

DeepSeek balances load with it, without a loss: after each optimizer step the bias of experts with more load than the
mean goes down by a rate, that of the others up. Transformers has the bias but never moves it.
"""

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.balance import bias_directions
from sparse_hf.algorithms.sharded_tensors import is_sharded
from sparse_hf.moe.modeling_mixture import FEED_FORWARDS, MODEL_TYPE


# Where it is in a block. It is a buffer, but for Ernie's, a parameter that needs no gradient. Ours is added to logits,
# the others to probabilities.
SELECTION_BIASES = {
    "deepseek_v3": ("gate", "e_score_correction_bias"),
    "dots1": ("gate", "e_score_correction_bias"),
    "glm4_moe": ("gate", "e_score_correction_bias"),
    "ernie4_5_moe": ("gate", "moe_statics", "e_score_correction_bias"),
    "lfm2_moe": ("expert_bias",),
    **{f"{MODEL_TYPE}{family}": ("router", "selection_bias") for family in FEED_FORWARDS},
}


def selection_biases(model: nn.Module, blocks: list[nn.Module]) -> list[Tensor]:
    """The biases of the blocks of a model, the tensors themselves, out of the optimizer's reach.

    (The choice has no gradient, but `from_pretrained` and PEFT's `modules_to_save` mark Ernie's as trained, and then
    DDP waits for it.)

    Raises:
        ValueError: it has none, ranks hold parts of them, or they would not be saved with an adapter.
    """
    model_type = model.config.model_type
    path = SELECTION_BIASES.get(model_type)
    biases = [] if path is None else [_at(block, path) for block in blocks]
    if not biases or any(bias is None for bias in biases):
        raise ValueError(
            "`bias_rate` needs routers with a bias for the choice alone, which stock models of type deepseek_v3, "
            "dots1, ernie4_5_moe, glm4_moe and lfm2_moe have, and our mixtures with `RouterConfig(bias=True)`, "
            f"got {model_type}{' without it' if path else ''}. Upcycle to one of these, or leave `bias_rate` at 0."
        )
    if any(map(is_sharded, biases)):
        raise ValueError(
            f"`bias_rate` moves biases that every rank holds whole, but those of {model_type} are parameters, which "
            "FSDP and DeepSpeed split. Use one process or DDP, or leave `bias_rate` at 0."
        )
    for bias in biases:
        bias.requires_grad_(False)
    saved = [one for name, one in model.state_dict(keep_vars=True).items() if ".modules_to_save." in name]
    if hasattr(model, "peft_config") and not all(any(bias is one for one in saved) for bias in biases):
        raise ValueError(
            "An adapter is saved without the biases that `bias_rate` moves unless they are in its `modules_to_save`, "
            f"got `{path[-1]}` outside. Name the module that holds it there, or leave `bias_rate` at 0."
        )
    return biases


@torch.no_grad()
def hold_in_float32(biases: list[Tensor]) -> None:
    """Make biases float32 in place: steps of 0.001 are too small for bfloat16."""
    for bias in biases:
        if bias.dtype != torch.float32:
            bias.data = bias.data.float()


@torch.no_grad()
def move_selection_biases(biases: list[Tensor], counts: Tensor, rate: float) -> None:
    """After an optimizer step: bias_i += rate * sign(mean load - load_i), in place, per layer.

    Args:
        counts: of choices in the step, on all ranks and in all micro-batches, int64 (layers, experts). Where there are
            none (a step of padding alone) biases stay.
    """
    for bias, change in zip(biases, rate * bias_directions(counts), strict=True):
        bias += change.to(bias.device).view_as(bias)


def _at(block: nn.Module, path: tuple[str, ...]) -> Tensor | None:
    found: object = block
    for name in path:  # PEFT's wrappers pass on what is asked of the module that they train
        found = getattr(found, name, None)
    return found if isinstance(found, Tensor) else None
