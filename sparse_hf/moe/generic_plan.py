"""What does every tensor of a generic mixture of experts consist of? Decided from headers alone.

For families without a mixture-of-experts sibling in Transformers; see `modeling_mixture`. Experts are stacks, so that
the names on disk are the modules'.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from sparse_hf.moe import modeling_mixture
from sparse_hf.moe.generic_families import STORED_FEED_FORWARDS, StoredFeedForward
from sparse_hf.moe.modeling_mixture import mixture_config_class, mixture_model_class, stock_models
from sparse_hf.moe.pairs import Pair
from sparse_hf.moe.router_init import Router, router_tensor
from sparse_hf.moe.targets import Target
from sparse_hf.storage.pieces import NUMBER_BYTES, CopyBytes, FillZeros
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


CODE = Path(modeling_mixture.__file__)  # to be copied beside the weights


def generic_tensors(
    headers: Mapping[str, StoredTensor],
    config: PreTrainedConfig,
    layers: frozenset[int],
    experts: int,
    router: Router,
) -> list[PlannedTensor]:
    """Every tensor of the mixture, in the order of the source: FFNs become mixtures, everything else is copied.

    Routers are float32 whatever the dtype of the rest. Buffers of old checkpoints that no model reads are left out.

    Args:
        headers: tensors of the dense checkpoint, a base model's or one with a head.
        config: of the dense model.
        layers: which layers become mixtures.
        experts: of every mixture.

    Raises:
        ValueError: the checkpoint does not hold what its architecture needs, or holds something unknown in an FFN, or
            a decoder beside T5's encoder; see also `check_source`.
    """
    check_source(config)
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
    ffns = {layer: _ffn(headers, table, f"{where}.{layer}") for layer in sorted(layers)}
    planned, done = [], set()
    for name, stored in headers.items():
        match = parts.fullmatch(name)
        layer = int(match["layer"]) if match else None
        if name.endswith(table.buffers):  # of an empty tuple: never
            continue
        if layer not in layers:
            planned.append(_copied(name, stored.shape, [stored]))
            continue
        if name not in {one.name for one in ffns[layer].values()}:
            raise ValueError(
                f"An FFN must consist of {', '.join((*table.up, table.down))}, but the checkpoint holds `{name}`: "
                "merge adapters and dequantise first."
            )
        if layer not in done:
            done.add(layer)
            planned += _mixture(ffns[layer], table, where, layer, experts, router)
    return planned


def generic_config(config: PreTrainedConfig, experts: int, top_k: int, layers: frozenset[int]) -> PreTrainedConfig:
    """The config of the mixture: the dense one's entries, and what `modeling_mixture` needs.

    `auto_map` names the classes in a copy of `CODE`, which belongs beside it for `trust_remote_code=True`.

    Raises:
        ValueError: see `check_source`.
    """
    check_source(config)
    model_type = config.model_type
    config_class = mixture_config_class(model_type)
    classes = {auto: mixture_model_class(stock).__name__ for auto, stock in stock_models(model_type).items()}
    names = {"AutoConfig": config_class.__name__, **classes}
    values = config.to_dict() | {
        "architectures": [f"Mixture{dense_class(config).__name__}"],
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in names.items()},
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "mixture_layers": sorted(layers),
    }
    del values["model_type"]
    return config_class.from_dict(values)


def generic_pair(config: PreTrainedConfig, target: str | None = None) -> Pair:
    """How the conversion of a dense config is called.

    Raises:
        ValueError: another `target` than its own is asked for.
    """
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


def _ffn(headers: Mapping[str, StoredTensor], table: StoredFeedForward, where: str) -> dict[str, StoredTensor]:
    """The FFN's tensors by their names in a layer, checked."""
    kinds = ("weight", "bias") if table.biased else ("weight",)
    names = [f"{part}.{kind}" for part in (*table.up, table.down) for kind in kinds]
    for name in names:
        if f"{where}.{name}" not in headers:
            raise ValueError(
                f"The checkpoint must hold the FFN of every layer, but `{where}.{name}` is missing:"
                " it is incomplete, or its config belongs to another."
            )
    ffn = {name: headers[f"{where}.{name}"] for name in names}
    shapes = {name: stored.shape for name, stored in ffn.items()}
    down = shapes[f"{table.down}.weight"]
    hidden, neurons = (down[::-1] if table.transposed else down) if len(down) == 2 else (0, 0)
    wanted = {f"{part}.weight": down[::-1] for part in table.up} | {f"{table.down}.weight": down}
    if table.biased:
        wanted |= {f"{part}.bias": (neurons,) for part in table.up} | {f"{table.down}.bias": (hidden,)}
    dtypes = {stored.dtype for stored in ffn.values()}
    if shapes != wanted or 0 in (hidden, neurons) or len(dtypes) > 1 or not dtypes <= set(NUMBER_BYTES):
        found = ", ".join(f"{name} {stored.dtype} {list(stored.shape)}" for name, stored in ffn.items())
        raise ValueError(
            f"The FFN `{where}` must have weights and biases that fit together, of one dtype of "
            f"{', '.join(NUMBER_BYTES)}, got {found}: the checkpoint is damaged or packed."
        )
    return ffn


def _mixture(
    ffn: Mapping[str, StoredTensor], table: StoredFeedForward, where: str, layer: int, experts: int, router: Router
) -> list[PlannedTensor]:
    """Router, guard and stacks of experts; a gate lies above its up matrix, expert by expert."""
    name, down = f"{where}.{layer}.{table.block}", ffn[f"{table.down}.weight"].shape
    hidden = down[1] if table.transposed else down[0]
    planned = [router_tensor(f"{name}.router.weight", layer, router, "F32", hidden, experts, 1)]
    # In the dense weight's place, so that stock classes refuse the checkpoint.
    planned.append(PlannedTensor(f"{where}.{layer}.{table.down}.weight", "U8", (1,), (FillZeros(1),)))
    for stack, layers in (
        ("gate_up_proj" if len(table.up) > 1 else "up_proj", table.up),
        ("down_proj", (table.down,)),
    ):
        for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + table.biased]:
            parts = [ffn[f"{layer}.{kind}"] for layer in layers]
            shape = (experts, len(parts) * parts[0].shape[0], *parts[0].shape[1:])
            planned.append(_copied(f"{name}.experts.{stack}{end}", shape, parts * experts))
    return planned


def _copied(name: str, shape: tuple[int, ...], parts: list[StoredTensor]) -> PlannedTensor:
    pieces = tuple(CopyBytes(part.file, part.offset, part.length) for part in parts)
    return PlannedTensor(name, parts[0].dtype, shape, pieces)
