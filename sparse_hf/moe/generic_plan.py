"""What does every tensor of a generic mixture of experts consist of? Decided from headers alone.

For families without a mixture-of-experts sibling in Transformers; see `modeling_mixture`. Experts are stacks, so that
the names on disk are the modules'.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from sparse_hf.moe import mixture_block, mixture_routers, modeling_mixture
from sparse_hf.moe.generic_experts import check_init, expert_tensors, stored_ffn
from sparse_hf.moe.generic_families import STORED_FEED_FORWARDS, StoredFeedForward
from sparse_hf.moe.generic_routers import router_tensors
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.modeling_mixture import (
    mixture_config_class,
    mixture_model_class,
    router_of_mixture,
    stock_models,
)
from sparse_hf.moe.pairs import Pair
from sparse_hf.moe.targets import Target
from sparse_hf.moe.upcycling_plan import mean_of
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


# To be copied beside the weights; the first defines the models.
CODE = tuple(Path(one.__file__) for one in (modeling_mixture, mixture_block, mixture_routers))


def generic_tensors(
    headers: Mapping[str, StoredTensor],
    config: PreTrainedConfig,
    layers: frozenset[int],
    mixture: Mixture,
    branches: Sequence[Mapping[str, StoredTensor]] = (),
    average: bool = False,
) -> list[PlannedTensor]:
    """Every tensor of the mixture, in the order of the source: FFNs become mixtures, everything else is copied.

    Routers are float32 whatever the dtype of the rest. Buffers of old checkpoints that no model reads are left out.

    Args:
        headers: tensors of the dense checkpoint, a base model's or one with a head.
        config: of the dense model.
        layers: which layers become mixtures.
        branches: tensors of models like the source, whose FFNs become the experts in turn, instead of the source's.
        average: whether everything else is the branches' mean, instead of the source's.

    Raises:
        ValueError: the checkpoint does not hold what its architecture needs, or holds something unknown in an FFN, or
            a decoder beside T5's encoder; see also `check_source`.
    """
    check_source(config)
    check_init(mixture.init)
    table = _table_of(headers, config.model_type)
    parts = _parts_pattern(table)
    found = [match for match in map(parts.fullmatch, headers) if match]
    prefixes = {match["prefix"] for match in found}
    if len(prefixes) != 1:
        raise ValueError(
            f"A {config.model_type} checkpoint must hold FFNs named `{table.layers}...` or "
            f"`{table.prefix}.{table.layers}...`, got {'both' if prefixes else 'neither'}: its config belongs to "
            "another model."
        )
    where = f"{prefixes.pop()}{table.layers}"
    models = (headers, *branches)
    ffns = {layer: [stored_ffn(one, table, f"{where}.{layer}") for one in models] for layer in sorted(layers)}
    planned, done = [], set()
    for name, stored in headers.items():
        match = parts.fullmatch(name)
        layer = int(match["layer"]) if match else None
        if name.endswith(table.buffers):  # of an empty tuple: never
            continue
        if layer not in layers:
            alike = [one[name] for one in branches] if average else [stored]
            planned.append(PlannedTensor(name, stored.dtype, stored.shape, (mean_of(alike),)))
            continue
        if name not in {one.name for one in ffns[layer][0].values()}:
            raise ValueError(
                f"An FFN must consist of {', '.join((*table.up, table.down))}, but the checkpoint holds `{name}`: "
                "merge adapters and dequantise first."
            )
        if layer not in done:
            done.add(layer)
            planned += router_tensors(f"{where}.{layer}.{table.block}.router", layer, mixture, config)
            planned += expert_tensors(ffns[layer], table, where, layer, mixture)
    return planned


def generic_config(
    config: PreTrainedConfig, experts: int, top_k: int, layers: frozenset[int], routing: RouterConfig | None = None
) -> PreTrainedConfig:
    """The config of the mixture: the dense one's entries, and what `modeling_mixture` needs.

    `auto_map` names the classes in a copy of `CODE`, which belongs beside it for `trust_remote_code=True`.

    Raises:
        ValueError: see `check_source`; or a model of this family cannot be routed like that.
    """
    check_source(config)
    model_type = config.model_type
    config_class = mixture_config_class(model_type)
    classes = {auto: mixture_model_class(stock).__name__ for auto, stock in stock_models(model_type).items()}
    names = {"AutoConfig": config_class.__name__, **classes}
    values = config.to_dict() | {
        "architectures": [f"Mixture{dense_class(config).__name__}"],
        "auto_map": {auto: f"{CODE[0].stem}.{name}" for auto, name in names.items()},
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "mixture_layers": sorted(layers),
        **(routing or RouterConfig()).entries(),
    }
    del values["model_type"]
    made = config_class.from_dict(values)
    router_of_mixture(made)
    return made


def generic_pair(config: PreTrainedConfig, target: str | None = None) -> Pair:
    """How the conversion of a dense config is called.

    Raises:
        ValueError: another `target` than its own is asked for; see also `check_source`.
    """
    check_source(config)
    made = Target(
        model_type=mixture_config_class(config.model_type).model_type,
        architecture=f"Mixture{dense_class(config).__name__}",
        experts={},
        router="",
        width="",
        count="num_experts",
        balance_loss=False,
        dense_layers="mixture_layers",
        remark="It loads after `import sparse_hf`, or by `trust_remote_code=True` from a file beside the weights.\n",
    )
    if target not in (None, made.model_type):
        raise ValueError(f"`target` of a {config.model_type} model must be {made.model_type!r}, got {target!r}.")
    return Pair(config.model_type, made, {})


def check_source(config: PreTrainedConfig) -> None:
    """Raise ValueError if the dense model is of another family, or quantised."""
    if config.model_type not in STORED_FEED_FORWARDS:
        choices = ", ".join(STORED_FEED_FORWARDS)
        raise ValueError(f"Generic mixtures of experts are made of {choices}, got {config.model_type!r}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("A quantised checkpoint has scales beside its weights, which are not converted: dequantise.")


def dense_class(config: PreTrainedConfig) -> type:
    """The model class that a dense config names, if mixtures have it too, else the base model's."""
    models = stock_models(config.model_type)
    named = (config.architectures or [None])[0]
    return next((one for one in models.values() if one.__name__ == named), models["AutoModel"])


def _table_of(headers: Mapping[str, StoredTensor], model_type: str) -> StoredFeedForward:
    tables = STORED_FEED_FORWARDS[model_type]
    for name in headers:
        if name.startswith(tables[0].foreign):
            raise ValueError(
                f"Of {model_type} models encoders become mixtures of experts, but the checkpoint holds `{name}`: save "
                "the encoder alone first (`T5EncoderModel.from_pretrained(source).save_pretrained(folder)`)."
            )
    names = "\n".join(headers)
    return next((one for one in tables if all(f".{up}." in names for up in one.up)), tables[0])


def _parts_pattern(table: StoredFeedForward) -> re.Pattern:
    """Any tensor of an FFN, known or not."""
    parts = "|".join(re.escape(part) for part in (*table.up, table.down))
    prefix, layers = re.escape(table.prefix), re.escape(table.layers)
    return re.compile(rf"(?P<prefix>(?:{prefix}\.)?){layers}\.(?P<layer>\d+)\.(?:{parts})\..*")
