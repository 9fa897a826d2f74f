"""Which experts does a dataset use?"""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf.moe.read_mixture import TARGETS, StoredMixture
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


@torch.no_grad()
def expert_usage(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> ExpertUsage:
    """Count the choices of every router of a Transformers model over a dataset.

    The choice is read where it is used: every architecture of ours calls its experts with the hidden states, the
    chosen experts and their weights, while what routers return differs between architectures and releases (Granite's
    order changed between 5.17 and 5.23). Nothing of the model is changed.

    Args:
        model: in eval mode, of one of the architectures in `read_mixture.TARGETS`.
        batches: keyword arguments of the model with `input_ids` of shape (batch, length). Tokens where
            `attention_mask`, of the same shape, is 0 are not counted; without one all are.

    Raises:
        ValueError: another architecture, training mode, a mask of another shape, no batches, or experts that were not
            called as expected; what cannot be read is never counted as 0.
    """
    experts = _experts_by_layer(model)
    count = getattr(model.config, TARGETS[model.config.model_type].count)
    counts = {layer: torch.zeros(count, dtype=torch.int64) for layer in experts}
    weights = {layer: torch.zeros(count, dtype=torch.float64) for layer in experts}
    seen = 0
    for batch in batches:
        counted = _counted_tokens(batch)
        for layer, (chosen, weight) in _choices(model, experts, batch).items():
            _check_choice(layer, chosen, weight, len(counted), count)
            chosen, weight = chosen.cpu()[counted].flatten(), weight.cpu()[counted].flatten()
            counts[layer] += torch.bincount(chosen, minlength=count)
            weights[layer] += torch.bincount(chosen, weight.double(), minlength=count)
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


def _experts_by_layer(model: PreTrainedModel) -> dict[int, nn.Module]:
    model_type = model.config.model_type
    if model_type not in TARGETS:
        raise ValueError(f"Usage is known for {', '.join(TARGETS)}, got {model_type!r}.")
    if any(module.training for module in model.modules()):
        raise ValueError("Usage is measured in eval mode, got a model in training mode: call `model.eval()`.")
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if len(parts) > 3 and parts[-1] == "experts" and parts[-4] == "layers":
            found[int(parts[-3])] = module
    if not found:
        raise ValueError(f"No experts were found in this {model_type} model: all its layers are dense.")
    return found


def _counted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Booleans, one per token of the flattened batch."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones(ids.numel(), dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must tell padding token by token in the shape {list(ids.shape)} of `input_ids`, got "
            f"{list(mask.shape)}."
        )
    return mask.flatten().cpu() != 0


def _choices(
    model: PreTrainedModel, experts: Mapping[int, nn.Module], batch: Mapping[str, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The chosen experts and their weights that each layer's experts were called with, for one batch."""
    calls: dict[int, list[tuple]] = {layer: [] for layer in experts}

    def note(layer: int, arguments: tuple) -> None:
        calls[layer].append(arguments)

    with ExitStack() as hooks:
        for layer, module in experts.items():
            hook = module.register_forward_pre_hook(lambda _, arguments, layer=layer: note(layer, arguments))
            hooks.callback(hook.remove)
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        model(**inputs, use_cache=False)
    for layer, called in calls.items():
        if len(called) != 1 or len(called[0]) != 3:
            raise ValueError(
                f"The experts of layer {layer} must be called once with hidden states, choice and weights, got "
                f"{len(called)} calls with {[len(one) for one in called]} arguments: this release of Transformers "
                f"runs {model.config.model_type} in another way."
            )
    return {layer: called[0][1:] for layer, called in calls.items()}


def _check_choice(layer: int, chosen: object, weight: object, tokens: int, experts: int) -> None:
    fits = (
        isinstance(chosen, Tensor)
        and isinstance(weight, Tensor)
        and chosen.dtype in (torch.int32, torch.int64)
        and weight.is_floating_point()
        and chosen.ndim == 2
        and chosen.shape == weight.shape
        and len(chosen) == tokens
        and bool(((chosen >= 0) & (chosen < experts)).all())
    )
    if not fits:
        found = [f"{one.dtype} {list(one.shape)}" for one in (chosen, weight) if isinstance(one, Tensor)]
        raise ValueError(
            f"The experts of layer {layer} must get numbers below {experts} and weights, both for {tokens} tokens, "
            f"got {found}: this release of Transformers runs them in another way."
        )


def _numbers(values: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and bool(values) and all(type(one) in kinds and one >= 0 for one in values)
