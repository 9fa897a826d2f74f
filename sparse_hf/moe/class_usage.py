"""Which experts does each domain, or each class of tokens, use?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.specialisation import Specialisation, specialisation
from sparse_hf.moe.counted_tokens import counted_tokens
from sparse_hf.moe.expert_calls import expert_calls, experts_by_block
from sparse_hf.moe.router_logits import EXPERT_COUNTS


@dataclass(frozen=True)
class ClassUsage:
    """How often the tokens of each class chose each expert.

    Attributes:
        layers: names of the blocks, in model order.
        classes: their names, by number.
        counts: of choices, int64 (classes, layers, experts).
        top_k: choices per token.
    """

    layers: tuple[str, ...]
    classes: tuple[str, ...]
    counts: Tensor
    top_k: int

    def specialisation(self) -> Specialisation:
        """What an expert tells about a token's class, in bits, with its noise floor."""
        return specialisation(self.counts, self.top_k)


def usage_by_class(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], column: str, classes: Sequence[str]
) -> ClassUsage:
    """Count the choices of every layer over a dataset, by the class of each token.

    Args:
        model: in eval mode, of a family whose routers can be read, see `docs/moe_balance.md`.
        batches: keyword arguments of the model and `column`, which the model does not get. Tokens where
            `attention_mask` (batch, length) is 0 are left out.
        column: numbers of classes, (batch,) for a class per row (domains), or (batch, length) for one per token.
            Negative ones, such as -100, are not counted.
        classes: the name of each number.

    Raises:
        ValueError: another family, training mode, no such column, numbers without a name, no tokens, or experts that
            cannot be read.
    """
    classes = tuple(classes)
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must name each class once, got {classes!r:.200}.")
    modules = experts_by_block(model)
    experts = getattr(model.config, EXPERT_COUNTS[model.config.model_type])
    counts = torch.zeros(len(modules), len(classes) * experts, dtype=torch.int64)
    top_k = 0
    for batch in batches:
        if column not in batch:
            raise ValueError(f"Each batch must have the column `{column}`, got {', '.join(batch)}.")
        calls = expert_calls(model, modules, {name: one for name, one in batch.items() if name != column})
        for layer, call in enumerate(calls.values()):
            labels = _labels(batch, column, len(call.chosen), len(classes))
            counted, chosen = labels >= 0, call.chosen.cpu()
            cells = (labels[counted, None] * experts + chosen[counted]).flatten()
            counts[layer] += torch.bincount(cells, minlength=len(classes) * experts)
            top_k = chosen.shape[1]
    if not counts.sum():
        raise ValueError("Usage needs at least one token that is labelled and not padding, got none.")
    by_layer = counts.view(len(modules), len(classes), experts)
    return ClassUsage(tuple(modules), classes, by_layer.transpose(0, 1).contiguous(), top_k)


def _labels(batch: Mapping[str, Tensor], column: str, tokens: int, classes: int) -> Tensor:
    """The class of each token, int64 (tokens,), negative for those that do not count."""
    labels = torch.as_tensor(batch[column]).cpu()
    per_row = labels.ndim == 1 and len(labels) and tokens % len(labels) == 0
    if labels.is_floating_point() or not (per_row or (labels.ndim == 2 and labels.numel() == tokens)):
        raise ValueError(
            f"`{column}` must hold whole numbers, one per row or per token of {tokens}, got {labels.dtype} of shape "
            f"{list(labels.shape)}."
        )
    if int(labels.max()) >= classes:
        raise ValueError(
            f"`{column}` must hold numbers below {classes}, one per name in `classes`, got {labels.max()}."
        )
    each = labels.repeat_interleave(tokens // len(labels)) if labels.ndim == 1 else labels.flatten()
    return each.long().masked_fill(~counted_tokens(batch.get("attention_mask"), tokens), -1)
