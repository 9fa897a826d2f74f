"""Transformers models whose layers have fewer heads and neurons than a stock config could say.

This file is self-contained: it is copied beside the weights of a slim model, so that
`AutoModel....from_pretrained(folder, trust_remote_code=True)` works where sparse_hf is not installed. It needs torch
and transformers only, and no fact about a family: the table of the model's units travels in its config, as data.

`SlimBertForSequenceClassification` and its like are made on demand from the stock class: built by the stock code, then
cut to the counts in `config.slim` before weights are loaded. Layers never load with silently fresh weights.

`config.slim` is {"format": 1, "table": {...}, "kept": {"encoder.layer.0.heads": 8, "encoder.layer.0.neurons": 1840,
...}}.
"""

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D


FORMAT = 1
KINDS = ("heads", "neurons")


@dataclass(frozen=True)
class UnitTable:
    """Where the heads and neurons of a family's layers are: paths of modules, relative to a layer.

    With grouped-query attention a unit of `heads` is a key/value head with all query heads that share it.
    """

    layers: str = field(metadata={"help": "Path of the list of layers, relative to the base model."})
    head_projections: dict[str, int] = field(
        metadata={"help": "Linear layers that make queries, keys, values; how many of these each holds, fused."}
    )
    head_output: str = field(metadata={"help": "Linear layer that reads all heads."})
    neuron_projections: dict[str, int] = field(
        metadata={"help": "Linear layers that make the neurons (up and gate); how many of these each holds, fused."}
    )
    neuron_output: str = field(metadata={"help": "Linear layer that reads all neurons."})
    head_attributes: dict[str, list[str]] = field(
        default_factory=dict, metadata={"help": "Per module: attributes in proportion to the number of heads."}
    )
    position_bias: str | None = field(
        default=None, metadata={"help": "Embedding with a column per head that the first layer makes for all (T5)."}
    )
    stock_names: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "What the stock config calls counts that all layers share: `heads`, `key_value_heads`, "
            "`head_size` and `neurons`. Without those of heads it cannot say that heads are missing."
        },
    )


class Slice(NamedTuple):
    """Which part of a tensor stays."""

    source: str  # its name in the model to cut from
    axis: int
    index: Tensor


def table_from_dict(content: object) -> UnitTable:
    """The table in a config, checked: it may come from anybody.

    Raises:
        ValueError: it is not a table.
    """
    names = {entry.name for entry in dataclasses.fields(UnitTable)}
    if not isinstance(content, dict) or not set(content) <= names:
        raise ValueError(f"A table of units must have the fields {sorted(names)}, got {content!r:.200}.")
    strings = [content.get(name) for name in ("layers", "head_output", "neuron_output")]
    counts = [content.get(name) for name in ("head_projections", "neuron_projections")]
    attributes, stock = content.get("head_attributes", {}), content.get("stock_names", {})
    well_formed = (
        all(_is_path(path) for path in strings)
        and all(isinstance(one, dict) and one and all(map(_is_path, one)) for one in counts)
        and all(type(parts) is int and parts > 0 for one in counts for parts in one.values())
        and isinstance(attributes, dict)
        and all(isinstance(names, list) and all(map(_is_path, [path, *names])) for path, names in attributes.items())
        and isinstance(stock, dict)
        and all(_is_path(value) for value in stock.values())
        and (content.get("position_bias") is None or _is_path(content["position_bias"]))
    )
    if not well_formed:
        raise ValueError(f"A table of units must hold module paths and counts, got {content!r:.200}.")
    return UnitTable(**content)


def _is_path(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else [""]
    return all(part.isdigit() or (part.isidentifier() and not part.startswith("_")) for part in parts)


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The base model inside `model` and the beginning of its parameters' names (`"bert."`, or nothing)."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def unit_counts(model: nn.Module, table: UnitTable) -> dict[str, int]:
    """How many heads and neurons each layer has, by unit key, in model order: read off the modules' shapes.

    Raises:
        ValueError: the table does not fit the model.
    """
    base, config = base_of(model)[1], model.config
    kept = (getattr(config, "slim", None) or {}).get("kept", {})
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    counts = {}
    for path, layer in _layers(base, table):
        counts[f"{path}.heads"] = kept.get(f"{path}.heads", heads)
        module = _submodule(layer, table.neuron_output)
        axis = _axis(module, "in")
        counts[f"{path}.neurons"] = module.weight.shape[axis]
    return counts


def unit_slices(model: nn.Module, table: UnitTable, kept: dict[str, Tensor]) -> dict[str, Slice]:
    """Which part of each parameter stays, by the full name that it has in the slim model.

    Args:
        kept: indices of the heads and neurons that stay, ascending int64, by unit key.

    Raises:
        ValueError: the table or the indices do not fit the model.
    """
    prefix, base = base_of(model)
    counts, slices = unit_counts(model, table), {}
    first_bias = None
    for path, layer in _layers(base, table):
        where, heads, neurons = f"{prefix}{path}.", kept[f"{path}.heads"], kept[f"{path}.neurons"]
        for modules, count, index in (
            (table.head_projections, counts[f"{path}.heads"], heads),
            (table.neuron_projections, counts[f"{path}.neurons"], neurons),
        ):
            for name, parts in modules.items():
                module = _submodule(layer, name)
                axis = _axis(module, "out")
                rows = _spread(index, count, module.weight.shape[axis], parts, where + name)
                slices[f"{where}{name}.weight"] = Slice(f"{where}{name}.weight", axis, rows)
                if module.bias is not None:
                    slices[f"{where}{name}.bias"] = Slice(f"{where}{name}.bias", 0, rows)
        for name, count, index in (
            (table.head_output, counts[f"{path}.heads"], heads),
            (table.neuron_output, counts[f"{path}.neurons"], neurons),
        ):
            module = _submodule(layer, name)
            axis = _axis(module, "in")
            columns = _spread(index, count, module.weight.shape[axis], 1, where + name)
            slices[f"{where}{name}.weight"] = Slice(f"{where}{name}.weight", axis, columns)
        if table.position_bias is not None:
            # One table for all layers cannot serve layers that keep different heads, so each gets its own columns.
            own = f"{where}{table.position_bias}.weight"
            first_bias = first_bias or own
            bias = dict(layer.named_modules()).get(table.position_bias)
            if not isinstance(bias, nn.Embedding) and (bias is not None or own == first_bias):
                raise ValueError(f"`{own}` must be of an nn.Embedding, got {type(bias).__name__}. Correct the table.")
            slices[own] = Slice(first_bias if bias is None else own, 1, heads)
    return slices


def shrink(model: nn.Module, table: UnitTable, kept: dict[str, Tensor]) -> dict[str, Slice]:
    """Cut the modules of `model` in place and return what was cut; see `unit_slices`."""
    slices = unit_slices(model, table, kept)
    old = dict(model.named_parameters(remove_duplicate=False))
    counts = unit_counts(model, table)
    if table.position_bias is not None:
        _give_each_layer_its_bias(model, table)
    for name, (source, axis, index) in slices.items():
        module_path, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_path)
        part = old[source].detach().index_select(axis, index.to(old[source].device))
        setattr(module, attribute, nn.Parameter(part, requires_grad=old[source].requires_grad))
        _tell_sizes(module)
    for path, layer in _layers(base_of(model)[1], table):
        for module_path, attributes in table.head_attributes.items():
            for attribute in attributes:
                module = _submodule(layer, module_path)
                size = getattr(module, attribute, None)
                if type(size) is not int:
                    raise ValueError(f"`{path}.{module_path}` must have a number `{attribute}`, got {size!r}.")
                setattr(module, attribute, size * len(kept[f"{path}.heads"]) // counts[f"{path}.heads"])
    return slices


def _give_each_layer_its_bias(model: nn.Module, table: UnitTable) -> None:
    """Let every layer make its own position bias, whatever the layer before hands on."""
    module_path, _, attribute = table.position_bias.rpartition(".")
    layers = [layer for _, layer in _layers(base_of(model)[1], table)]
    first = getattr(_submodule(layers[0], module_path), attribute)
    for layer in layers:
        attention = _submodule(layer, module_path)
        if not hasattr(attention, attribute):
            own = nn.Embedding(*first.weight.shape, device=first.weight.device, dtype=first.weight.dtype)
            setattr(attention, attribute, own)
            attention.has_relative_attention_bias = True
        attention.register_forward_pre_hook(_without_foreign_bias, with_kwargs=True)


def _without_foreign_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "position_bias": None}


def _layers(base: nn.Module, table: UnitTable) -> list[tuple[str, nn.Module]]:
    layers = _submodule(base, table.layers)
    if not isinstance(layers, (nn.ModuleList, nn.Sequential)):
        raise ValueError(
            f"`{table.layers}` must be the list of layers, got {type(layers).__name__}. Correct the table."
        )
    return [(f"{table.layers}.{number}", layer) for number, layer in enumerate(layers)]


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"The table of units must fit the model, but `{type(module).__name__}` has no `{path:.200}`. "
            "Correct the table."
        ) from error


def _axis(module: nn.Module, side: str) -> int:
    """The axis of `module.weight` along its outputs (`out`) or inputs (`in`)."""
    weight = module.weight if isinstance(module, (nn.Linear, Conv1D)) else None
    # Quantised weights are packed integers, float8 beside its scales, or a class of their own.
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(
            f"Heads and neurons are cut from unquantised nn.Linear or Conv1D layers, got {kind}"
            f"{'' if weight is None else f' of {type(weight).__name__}s in {weight.dtype}'}. "
            "Load the model unquantised, and merge adapters first."
        )
    return int((side == "in") != isinstance(module, Conv1D))


def _spread(index: Tensor, count: int, size: int, parts: int, name: str) -> Tensor:
    """The rows, of the `size` rows of a matrix, that belong to the units `index` of `count`, in each fused part."""
    if size % (count * parts):
        raise ValueError(f"`{name}` has {size} rows, which {parts} parts of {count} units do not divide.")
    in_range = len(index) > 0 and int(index.min()) >= 0 and int(index.max()) < count
    if not in_range:
        raise ValueError(
            f"At least one of the {count} units of `{name}` must stay and none can be added, got {index}."
        )
    width = size // (count * parts)
    rows = (index[:, None] * width + torch.arange(width, device=index.device)).flatten()
    return torch.cat([rows + part * count * width for part in range(parts)])


def _tell_sizes(module: nn.Module) -> None:
    """Sizes that a module keeps beside its weight, which printing, Conv1D and exporters read."""
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape


def slim_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class of slim models of a stock `model_type`: `slim_bert` for `bert`."""
    base = CONFIG_MAPPING[model_type]
    name = f"Slim{base.__name__}"
    if name in globals():
        return globals()[name]

    def __post_init__(self: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        base.__post_init__(self, *args, **kwargs)
        _register_models(type(self), model_type)

    members = {
        "__post_init__": __post_init__,
        "__module__": __name__,
        "__doc__": f"A {base.__name__} whose `slim` says how many heads and neurons each layer has.",
        "model_type": f"slim_{model_type}",
        "_auto_class": "AutoConfig",
    }
    globals()[name] = type(name, (base,), members)
    return globals()[name]


def _register_models(config_class: type[PreTrainedConfig], model_type: str) -> None:
    """Let the auto classes know the models of a config: when one is read, so that no other family is imported."""
    for auto, stock in auto_classes(model_type).items():
        getattr(transformers, auto).register(config_class, slim_model_class(stock), exist_ok=True)


def slim_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of slim models of a stock model class."""
    name = f"Slim{base.__name__}"
    if name in globals() and globals()[name].__bases__ == (base,):  # a user's class may be called like a stock one
        return globals()[name]
    model_type = base.config_class.model_type

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        base.__init__(self, config, *args, **kwargs)
        _shrink_to_config(self, config)

    def from_pretrained(
        cls: type[PreTrainedModel], *args: object, output_loading_info: bool = False, **kwargs: object
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
        """The stock method, but what the checkpoint does not fill of the base model is an error, not fresh weights."""
        model, info = super(made, cls).from_pretrained(*args, output_loading_info=True, **kwargs)
        _require_filled(model, info)
        return (model, info) if output_loading_info else model

    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"A {base.__name__} with fewer heads and neurons per layer, as `config.slim` says.",
        "__signature__": inspect.signature(base.__init__),
        "config_class": slim_config_class(model_type),
        "from_pretrained": classmethod(from_pretrained),
        # Both are guessed from the source text of the class's file, which is this one.
        "_can_set_attn_implementation": classmethod(lambda cls: base._can_set_attn_implementation()),
        "_can_set_experts_implementation": classmethod(lambda cls: base._can_set_experts_implementation()),
        "_auto_class": next((auto for auto, stock in auto_classes(model_type).items() if stock is base), "AutoModel"),
    }
    made = globals()[name] = type(name, (base,), members)
    # Checkpoints of some families (ViT) have other names than the modules, by a list kept under the class's name.
    if (renaming := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renaming, overwrite=True)
    return made


def _shrink_to_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    slim = getattr(config, "slim", None)
    if not isinstance(slim, dict) or slim.get("format") != FORMAT or not isinstance(slim.get("kept"), dict):
        raise ValueError(
            f"A slim model's config must have `slim` of format {FORMAT} with the counts `kept`, got {slim!r:.200}. "
            "The file is damaged, or a newer sparse_hf wrote it."
        )
    table, kept = table_from_dict(slim.get("table")), slim["kept"]
    config.slim = None  # the model is still whole
    counts = unit_counts(model, table)
    config.slim = slim
    if set(kept) != set(counts) or not all(type(kept[key]) is int and 0 < kept[key] <= counts[key] for key in counts):
        raise ValueError(
            f"`config.slim` must keep between 1 and all units of each layer ({counts}), got {kept!r:.500}. "
            "The file is damaged."
        )
    config.slim = None
    shrink(model, table, {key: torch.arange(kept[key], device="cpu") for key in counts})
    config.slim = slim


def _require_filled(model: PreTrainedModel, info: dict) -> None:
    """Raise ValueError if weights of the base model are fresh; a head is new under another task, a pooler may be."""
    # Where the base model is not a module of its own, its layers are known from the head.
    prefix = base_of(model)[0] or f"{model.config.slim['table']['layers']}."
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    fresh = sorted(name for name in missing if name.startswith(prefix) and not name.startswith(f"{prefix}pooler."))
    if fresh:
        raise ValueError(
            "The checkpoint must hold every weight of the base model in the size that its config tells, but "
            f"`{fresh[0]}` ({len(fresh)} in all) is missing or has another shape. It or its config is damaged."
        )


def auto_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The stock model class behind the name of every auto class that serves `model_type`."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if inspect.isclass(auto) else None
        names = None if mapping is None else mapping._model_mapping.get(model_type)
        if names is None or not name.startswith("AutoModel"):
            continue
        stock = getattr(transformers, names if isinstance(names, str) else names[0])
        if stock.config_class.model_type == model_type:  # Qwen2's list has a model with another config
            found[name] = stock
    return found


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix("Slim"), None) if name.startswith("Slim") else None
    if inspect.isclass(stock) and issubclass(stock, PreTrainedConfig):
        return slim_config_class(stock.model_type)
    if inspect.isclass(stock) and issubclass(stock, PreTrainedModel):
        return slim_model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
