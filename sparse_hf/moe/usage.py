"""Which experts does a dataset use?"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.moe.counted_tokens import counted_tokens
from sparse_hf.moe.expert_calls import expert_calls, experts_by_block
from sparse_hf.moe.read_mixture import StoredMixture
from sparse_hf.moe.router_logits import EXPERT_COUNTS, layer_number
from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.durable import write_json


KIND = "expert_usage"


@dataclass(frozen=True)
class ExpertUsage:
    """How often each expert was chosen, by layer.

    Attributes:
        counts: of tokens that chose the expert, int64 of shape (experts,); a layer's sum is tokens x top_k.
        weights: the sum of the routing weights it got from them, float64 of shape (experts,).
    """

    counts: dict[int, Tensor]
    weights: dict[int, Tensor]


def expert_usage(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> ExpertUsage:
    """Count the choices of every router of a Transformers model over a dataset. Nothing of the model is changed.

    Args:
        model: in eval mode, of a family whose routers can be read, see `docs/moe_balance.md`.
        batches: keyword arguments of the model. Tokens where `attention_mask` (batch, length) is 0 are not counted;
            without one all are.

    Raises:
        ValueError: another family, training mode, a mask of another shape, no tokens, or experts that were not
            called as expected; what cannot be read is never counted as 0.
    """
    experts = experts_by_block(model)
    layers = {name: layer_number(name) for name in experts}
    count = getattr(model.config, EXPERT_COUNTS[model.config.model_type])
    counts = {layer: torch.zeros(count, dtype=torch.int64) for layer in layers.values()}
    weights = {layer: torch.zeros(count, dtype=torch.float64) for layer in layers.values()}
    seen = 0
    for batch in batches:
        calls = expert_calls(model, experts, batch)
        counted = counted_tokens(batch.get("attention_mask"), len(next(iter(calls.values())).chosen))
        for name, call in calls.items():
            chosen, weight = call.chosen.cpu()[counted].flatten(), call.weights.cpu()[counted].flatten()
            counts[layers[name]] += torch.bincount(chosen, minlength=count)
            weights[layers[name]] += torch.bincount(chosen, weight.double(), minlength=count)
        seen += int(counted.sum())
    if not seen:
        raise ValueError("Usage needs at least one token that is not padding, got none.")
    return ExpertUsage(counts, weights)


def save_usage(usage: ExpertUsage, path: str | Path) -> None:
    """Write the usage as JSON; `load_usage` reads it back exactly."""
    layers = {
        str(layer): {"counts": counts.tolist(), "weights": usage.weights[layer].tolist()}
        for layer, counts in usage.counts.items()
    }
    write_json(Path(path), {"kind": KIND, "layers": layers})


def load_usage(path: str | Path) -> ExpertUsage:
    """Read what `save_usage` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or damaged.
    """
    path = Path(path)
    content = read_json(path)
    layers = field(content, "layers", dict, path)
    if content.get("kind") != KIND or not layers:
        raise ValueError(f"`{path}` must hold the usage of experts, its kind is {content.get('kind')!r:.80}.")
    counts, weights = {}, {}
    for name, entry in layers.items():
        if not name.isdecimal() or not isinstance(entry, dict) or entry.keys() != {"counts", "weights"}:
            raise ValueError(f"Each layer in `{path}` must have a number, `counts` and `weights`, got {name!r:.80}.")
        if not _numbers(entry["counts"], (int,)) or not _numbers(entry["weights"], (int, float)):
            raise ValueError(f"`counts` and `weights` of layer {name} in `{path}` must be numbers of 0 or more.")
        if len(entry["counts"]) != len(entry["weights"]):
            raise ValueError(f"Layer {name} in `{path}` must have as many `counts` as `weights`.")
        counts[int(name)] = torch.tensor(entry["counts"], dtype=torch.int64)
        weights[int(name)] = torch.tensor(entry["weights"], dtype=torch.float64)
    order = sorted(counts)
    return ExpertUsage({one: counts[one] for one in order}, {one: weights[one] for one in order})


def usage_of(mixture: StoredMixture, usage: Mapping[int, Tensor]) -> dict[int, list[float]]:
    """The usage as numbers, if it fits the mixture.

    Raises:
        ValueError: other layers, another number of experts, or not all are finite numbers of 0 or more.
    """
    if not isinstance(usage, Mapping) or usage.keys() != mixture.layers.keys():
        found = sorted(usage) if isinstance(usage, Mapping) else type(usage).__name__
        raise ValueError(
            f"`usage` must map each of the mixture's layers {sorted(mixture.layers)} to a tensor, such as "
            f"`expert_usage(...).counts`, got {found}."
        )
    numbers = {layer: [float(one) for one in values] for layer, values in usage.items()}
    for layer, values in numbers.items():
        if len(values) != mixture.experts or not all(0 <= one < math.inf for one in values):
            raise ValueError(
                f"`usage` of layer {layer} must be {mixture.experts} numbers of 0 or more, one per expert, got "
                f"{values!r:.80}."
            )
    return numbers


def _numbers(values: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and bool(values) and all(type(one) in kinds and one >= 0 for one in values)
