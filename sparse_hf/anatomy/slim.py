"""Cut heads and neurons out of a model for real."""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.anatomy.modeling_slim import (
    FORMAT,
    UnitTable,
    auto_classes,
    slim_config_class,
    slim_model_class,
    unit_slices,
)
from sparse_hf.anatomy.units import Units, find_units, table_of


def cut_units(
    model: PreTrainedModel, kept: Mapping[str, Tensor], table: UnitTable | None = None, uniform: bool = False
) -> PreTrainedModel:
    """A new, smaller model that has only the kept heads and neurons; every weight is a bit-equal part of `model`'s.

    Where all layers keep the same counts and the stock config can say so, the new model is of the stock class and its
    folder loads anywhere. Otherwise its class is `Slim<stock class>`, with the counts of each layer in `config.slim`.

    Args:
        model: is left as it is; parameters are copied.
        kept: 1-D bool masks, True = kept, by unit key.
        table: of a family that is not supported.
        uniform: insist on the stock form.

    Raises:
        ValueError: the masks do not fit the model, empty a layer, or `uniform` and the stock config cannot say it.
        TypeError: the model is no `PreTrainedModel`.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Heads and neurons are cut from a `PreTrainedModel`, got {type(model).__name__}.")
    table = table or table_of(model)
    units = find_units(model, table)
    _check_masks(units, kept)
    indices = {one.key: kept[one.key].nonzero().flatten().cpu() for one in units}
    counts = {key: len(index) for key, index in indices.items()}
    if uniform:
        check_stock_form(model, kept, table)
    slices = unit_slices(model, table, indices)
    smaller = _empty_model(model, table, units, counts)
    _fill(smaller, model, slices)
    smaller.train(model.training)
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def check_stock_form(model: PreTrainedModel, kept: Mapping[str, Tensor], table: UnitTable) -> None:
    """Raise ValueError if the stock config cannot say how many heads and neurons these masks keep."""
    counts = {key: int(mask.sum()) for key, mask in kept.items()}
    if reason := _why_not_stock(model, table, find_units(model, table), counts):
        raise ValueError(
            f"`uniform=True` needs a form that the stock config can say, but {reason}. Leave `uniform` out: the model "
            "then loads after `import sparse_hf`, or with `trust_remote_code=True`."
        )


def _check_masks(units: list[Units], kept: Mapping[str, Tensor]) -> None:
    wanted = {one.key: one.count for one in units}
    if set(wanted) != set(kept):
        key = min(set(wanted) ^ set(kept))
        has = "lacks" if key in wanted else "has no place for"
        raise ValueError(
            f"The masks must name every layer's heads and neurons, got masks of another model: it {has} `{key}`."
        )
    for key, count in wanted.items():
        mask = kept[key]
        if mask.dtype != torch.bool or tuple(mask.shape) != (count,):
            raise ValueError(
                f"The mask of `{key}` must be {count} bools, got {tuple(mask.shape)} of {mask.dtype}: "
                "the ticket belongs to another model."
            )
        if not mask.any():
            raise ValueError(f"At least one unit of `{key}` must stay, got none: lower the fraction that is cut.")


def _why_not_stock(
    model: PreTrainedModel, table: UnitTable, units: list[Units], counts: Mapping[str, int]
) -> str | None:
    """Why the stock config cannot say these counts; None if it can."""
    model_type = _stock_class(type(model)).config_class.model_type
    groups = getattr(model.config, "num_key_value_heads", None)
    heads = ("heads", "head_size") if groups is None else ("heads", "head_size", "key_value_heads")
    for kind, names, whole in (
        ("heads", heads, groups or model.config.num_attention_heads),
        ("neurons", ("neurons",), None),
    ):
        of_kind = [one for one in units if one.kind == kind]
        different = {counts[one.key] for one in of_kind}
        if different == {whole} or (not _is_slim(model) and all(counts[one.key] == one.count for one in of_kind)):
            continue  # none is missing
        if len(different) > 1:
            return f"the layers keep different numbers of {kind} ({sorted(different)})"
        if any(name not in table.stock_names for name in names):
            return f"a {model_type} config cannot say that {kind} are missing"
    try:
        _stock_config(model, table, units, counts)
    except StrictDataclassError as error:  # Llama's: the hidden size must be a multiple of the number of heads
        return f"a {model_type} config refuses them: {error.__cause__ or error}".rstrip(".")
    return None


def _empty_model(
    model: PreTrainedModel, table: UnitTable, units: list[Units], counts: Mapping[str, int]
) -> PreTrainedModel:
    model_class = _stock_class(type(model))
    if _why_not_stock(model, table, units, counts) is None:
        config = _stock_config(model, table, units, counts)
    else:
        slim = {
            "slim": {"format": FORMAT, "table": dataclasses.asdict(table), "kept": dict(counts)},
            "auto_map": _auto_map(model_class.config_class.model_type),
        }
        model_class = slim_model_class(model_class)
        config = _config(model, model_class.config_class, slim)
    with torch.device("meta"):
        return model_class(config)


def _stock_config(
    model: PreTrainedModel, table: UnitTable, units: list[Units], counts: Mapping[str, int]
) -> PreTrainedConfig:
    return _config(model, _stock_class(type(model)).config_class, _stock_counts(model, table, units, counts))


def _config(
    model: PreTrainedModel, config_class: type[PreTrainedConfig], changes: Mapping[str, object]
) -> PreTrainedConfig:
    """A `config_class` with what `model.config` says, but for `changes`."""
    values = {
        key: value for key, value in model.config.to_dict().items() if key not in ("slim", "auto_map", "model_type")
    }
    config = config_class.from_dict({**values, **changes})
    config._name_or_path = model.config._name_or_path
    config._attn_implementation = model.config._attn_implementation
    return config


def _is_slim(model: PreTrainedModel) -> bool:
    return _stock_class(type(model)) is not type(model)


def _stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a slim class was made from; a stock class itself."""
    return model_class.__bases__[0] if model_class.config_class.model_type.startswith("slim_") else model_class


def _auto_map(model_type: str) -> dict[str, str]:
    """Where `trust_remote_code=True` finds the classes: in the copy of `modeling_slim.py` beside the weights."""
    classes = {name: f"modeling_slim.Slim{stock.__name__}" for name, stock in auto_classes(model_type).items()}
    return {"AutoConfig": f"modeling_slim.{slim_config_class(model_type).__name__}", **classes}


def _stock_counts(
    model: PreTrainedModel, table: UnitTable, units: list[Units], counts: Mapping[str, int]
) -> dict[str, int]:
    """The entries of a stock config that say the counts which all layers share."""
    names, values = table.stock_names, {}
    heads, neurons = (next(one for one in units if one.kind == kind) for kind in ("heads", "neurons"))
    if "neurons" in names:
        values[names["neurons"]] = counts[neurons.key]
    if "heads" in names and "head_size" in names:
        # A unit of grouped-query attention is one key/value head with all its query heads.
        groups = getattr(model.config, "num_key_value_heads", None)
        queries = 1 if groups is None else model.config.num_attention_heads // groups
        values[names["heads"]] = counts[heads.key] * queries
        values[names["head_size"]] = heads.width // queries
        if groups is not None:
            values[names["key_value_heads"]] = counts[heads.key]
    return values


@torch.no_grad()
def _fill(smaller: PreTrainedModel, model: PreTrainedModel, slices: Mapping[str, object]) -> None:
    """Give `smaller` copies of the parts of `model`'s tensors, with their dtypes and devices; ties stay ties."""
    sources = dict(model.named_parameters(remove_duplicate=False))
    made: dict[tuple, nn.Parameter] = {}
    for name, _ in list(smaller.named_parameters(remove_duplicate=False)):
        part = slices.get(name)
        source = sources.get(name if part is None else part.source)
        if source is None:
            raise ValueError(
                f"`{type(model).__name__}` must have the parameters of its class, but `{name}` is wrapped, quantised "
                "or parametrised. Merge adapters and remove parametrisations first."
            )
        known = (id(source), None if part is None else id(part.index))
        if known not in made:
            value = source if part is None else source.index_select(part.axis, part.index.to(source.device))
            made[known] = nn.Parameter(value.detach().clone(), requires_grad=source.requires_grad)
        _put(smaller, name, made[known], "_parameters")
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, _ in list(smaller.named_buffers(remove_duplicate=False)):
        _put(smaller, name, buffers[name].detach().clone(), "_buffers")


def _put(model: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    path, _, attribute = name.rpartition(".")
    getattr(model.get_submodule(path), kind)[attribute] = tensor
