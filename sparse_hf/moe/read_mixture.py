"""Where in a stock mixture-of-experts checkpoint are the routers and the matrices of each expert?"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from sparse_hf.moe import targets
from sparse_hf.moe.targets import Target
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


TARGETS = {one.model_type: one for one in vars(targets).values() if isinstance(one, Target)}


@dataclass(frozen=True)
class StoredLayer:
    """The mixture of one layer.

    Attributes:
        router: weight of shape (experts, hidden).
        experts: of each its `gate_proj`, `up_proj` (neurons, hidden) and `down_proj` (hidden, neurons); rows of one
            tensor where the checkpoint holds all experts, or gate and up, in one.
        beside: biases of the choice and the like, by the target's template; empty where the checkpoint has none.
        shared: the matrices of the shared expert; empty if there is none.
    """

    router: StoredTensor
    experts: tuple[Mapping[str, StoredTensor], ...]
    beside: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]

    def routed_names(self) -> frozenset[str]:
        """The tensors of the checkpoint that are made for the number of experts."""
        matrices = [stored for expert in self.experts for stored in expert.values()]
        return frozenset(stored.name for stored in (self.router, *matrices, *self.beside.values()))

    def shared_names(self) -> frozenset[str]:
        """The tensors of the shared expert."""
        return frozenset(stored.name for stored in self.shared.values())


@dataclass(frozen=True)
class StoredMixture:
    """A mixture-of-experts checkpoint on disk; no weights are held."""

    folder: Path
    config: PreTrainedConfig
    target: Target
    experts: int
    top_k: int
    headers: Mapping[str, StoredTensor]
    layers: Mapping[int, StoredLayer]


def read_mixture(folder: Path) -> StoredMixture:
    """Find router and experts of every layer from config and headers.

    Raises:
        FileNotFoundError: no config, no weights, or a shard is missing.
        ValueError: the architecture is none of ours, tensors are missing, unknown ones lie among the experts (scales
            of a quantised checkpoint, for instance), or shapes and config disagree.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in TARGETS:
        raise ValueError(f"`{folder}` must hold a mixture of {', '.join(TARGETS)}, got {model_type!r:.80}.")
    target, config = TARGETS[model_type], AutoConfig.from_pretrained(folder)
    experts, top_k = (_number(config, name) for name in (target.count, target.top_k))
    headers = read_headers(folder)
    layers = {
        layer: _layer({name: headers[name] for name in names}, target, layer, config, experts)
        for layer, names in sorted(_mixture_layers(headers, target, config).items())
    }
    for part in ("beside", "shared"):
        have = [layer for layer, one in layers.items() if getattr(one, part)]
        if have and len(have) < len(layers):
            without = min(layers.keys() - have)
            raise ValueError(
                f"All layers must have the same beside their experts, but layer {have[0]} has {part} tensors and "
                f"layer {without} has none: the checkpoint is incomplete."
            )
    return StoredMixture(folder, config, target, experts, top_k, headers, layers)


def _number(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is not int or value < 1:
        raise ValueError(f"`{name}` in the config must be one number for all layers, got {value!r:.80}.")
    return value


def _mixture_layers(
    headers: Mapping[str, StoredTensor], target: Target, config: PreTrainedConfig
) -> dict[int, list[str]]:
    """The names of each layer's tensors, for layers that have anything of a mixture."""
    templates = (target.router, *target.experts, *target.zeros)
    routed = re.compile("|".join(_pattern(one) for one in templates))
    # Up to the mixture's block, which is a dense FFN's in other layers.
    block = re.compile(_pattern(".".join(target.router.split(".")[:4])) + r"\..*")
    names, found, ffns = defaultdict(list), set(), set()
    for name in headers:
        match = re.match(_pattern(target.router.partition("{layer}")[0] + "{layer}") + r"\.", name)
        if match:
            layer = int(next(number for number in match.groups() if number is not None))
            names[layer].append(name)
            found |= {layer} if routed.fullmatch(name) else set()
            ffns |= {layer} if block.fullmatch(name) else set()
    count = config.num_hidden_layers
    if beyond := sorted(layer for layer in names if layer >= count):
        raise ValueError(
            f"The checkpoint must hold the layers 0 to {count - 1} of its config, it holds layer {beyond[0]}: layers "
            "that predict further tokens have experts of their own, which are not known. Remove them."
        )
    if missing := sorted(set(range(count)) - ffns):
        raise ValueError(f"The checkpoint must hold {count} layers, layer {missing[0]} has neither experts nor FFN.")
    if not found:
        raise ValueError(
            f"A {target.model_type} checkpoint must hold experts under names like "
            f"`{next(iter(target.experts))}`, none was found."
        )
    return {layer: names[layer] for layer in found}


def _pattern(template: str) -> str:
    return re.sub(r"\\\{(?:layer|expert)\\\}", r"(\\d+)", re.escape(template))


def _layer(
    tensors: Mapping[str, StoredTensor], target: Target, layer: int, config: PreTrainedConfig, experts: int
) -> StoredLayer:
    width, hidden = _number(config, target.width), config.hidden_size
    router = _tensor(tensors, target.router.format(layer=layer), (experts, hidden))
    found: list[dict[str, StoredTensor]] = [{} for _ in range(experts)]
    for template, matrices in target.experts.items():
        shape = (hidden, width) if matrices == ("down_proj",) else (len(matrices) * width, hidden)
        if "{expert}" in template:
            names = [template.format(layer=layer, expert=expert) for expert in range(experts)]
            wholes = [_tensor(tensors, name, shape) for name in names]
        else:
            together = _tensor(tensors, template.format(layer=layer), (experts, *shape))
            wholes = [replace(together.rows(expert, 1), shape=shape) for expert in range(experts)]
        for expert, whole in zip(found, wholes, strict=True):
            expert |= _split(whole, matrices)
    beside = {one: tensors[name] for one in target.zeros if (name := one.format(layer=layer)) in tensors}
    for template, stored in beside.items():
        sizes = {"experts": experts, "hidden": hidden}
        _check_shape(stored, tuple(sizes.get(size, size) for size in target.zeros[template]))
    shared = _shared(tensors, target, layer)
    one = StoredLayer(router, tuple(found), beside, shared)
    _check_known(tensors, one, target, layer)
    if len(dtypes := {stored.dtype for expert in found for stored in expert.values()}) > 1:
        raise ValueError(f"The experts of layer {layer} must have one dtype, got {', '.join(sorted(dtypes))}.")
    return one


def _shared(tensors: Mapping[str, StoredTensor], target: Target, layer: int) -> dict[str, StoredTensor]:
    found = {}
    for template, matrices in target.shared.tensors.items() if target.shared else ():
        name = template.format(layer=layer)
        if name in tensors:
            found |= _split(tensors[name], matrices)
    if found and found.keys() != set(targets.MATRICES):
        missing = ", ".join(sorted(set(targets.MATRICES) - found.keys()))
        raise ValueError(f"The shared expert of layer {layer} must be complete, {missing} is missing.")
    return found


def _split(whole: StoredTensor, matrices: tuple[str, ...]) -> dict[str, StoredTensor]:
    part = whole.shape[0] // len(matrices)
    return {matrix: whole.rows(number * part, part) for number, matrix in enumerate(matrices)}


def _tensor(tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> StoredTensor:
    if name not in tensors:
        raise ValueError(
            f"The checkpoint must hold router and experts of every mixture, but `{name}` is missing: it is "
            "incomplete, packed, or its config belongs to another."
        )
    _check_shape(tensors[name], shape)
    return tensors[name]


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ValueError(f"`{stored.name}` must be {list(shape)} as the config says, got {list(stored.shape)}.")


def _check_known(tensors: Mapping[str, StoredTensor], one: StoredLayer, target: Target, layer: int) -> None:
    """Nothing unknown in the block: it could be one expert's, and would be given to another."""
    block = ".".join(target.router.split(".")[:4]).format(layer=layer) + "."
    known = one.routed_names() | one.shared_names()
    for name in tensors:
        if name.startswith(block) and name not in known and "shared" not in name:
            raise ValueError(
                f"A mixture must consist of router and experts as its config counts them, but the checkpoint holds "
                f"`{name}` too: it is quantised, or its config belongs to another."
            )
