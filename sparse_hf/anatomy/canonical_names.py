"""One name for one parameter, whatever head or wrapper stands around the model.

A canonical name is relative to the base model: `encoder.layer.0.output.dense.weight` on BertModel, on
BertForSequenceClassification (full name `bert.encoder...`), and on either under DDP (`module.`) or torch.compile
(`_orig_mod.`). So what was found on one model of a family fits the others. Parameters and buffers outside the base
model (task heads) keep their full name, less the wrappers. A model without a base model module
(T5ForConditionalGeneration, a plain nn.Module) keeps the names it has; there the output embeddings are the head.
"""

import difflib
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf.anatomy.families import HEADS_WITHOUT_BASE, WRAPPERS


class HeadNames(NamedTuple):
    """Canonical names of the parameters and of the buffers that are outside the base model."""

    parameters: frozenset[str]
    buffers: frozenset[str]


class _Named(NamedTuple):
    """One name of a tensor; a tied tensor has several."""

    full: str
    relative: str  # without wrappers and base model prefix
    in_base: bool
    tensor: Tensor


def named_canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of `model` once, by canonical name, in model order.

    A tied parameter goes by the first of its names that is inside the base model (else by its first name), and stands
    in that name's place, so that the order inside the base model is the same with and without a head.

    Raises ValueError if two different tensors would share a canonical name (see `canonical_names`).
    """
    chosen = _chosen_names(_parameters(model))
    return {name.relative: name.tensor for name in chosen}


def head_names(model: nn.Module) -> HeadNames:
    """Canonical names of the parameters and buffers outside the base model. None, for a bare model.

    A head parameter that is tied to one of the base model (the output embeddings of GPT-2) belongs to the base model.
    """
    outside = [
        frozenset(name.relative for name in _chosen_names(names) if not name.in_base)
        for names in (_parameters(model), _buffers(model))
    ]
    return HeadNames(*outside)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The canonical name of every full name of `model`: of parameters, then of buffers, each in model order.

    Full names are those of `model.named_parameters(remove_duplicate=False)`, wrappers and tied names included; all
    names of a tied parameter have the same canonical name.

    Raises ValueError if two different tensors would share a canonical name: a head module named like a part of the
    base model. Heads are not renamed around this, because a name must not depend on what else the model holds.
    """
    mapping = {}
    for names in (_parameters(model), _buffers(model)):
        chosen = {id(name.tensor): name.relative for name in _chosen_names(names)}
        mapping.update({name.full: chosen[id(name.tensor)] for name in names})
    return mapping


def canonical_name(model: nn.Module, full_name: str) -> str:
    """The canonical name of the parameter or buffer that `model` calls `full_name`; ValueError if there is none."""
    mapping = canonical_names(model)
    if full_name not in mapping:
        raise _unknown_name(model, full_name, list(mapping))
    return mapping[full_name]


def full_name(model: nn.Module, canonical_name: str) -> str:
    """The name under which `model` holds the parameter or buffer `canonical_name`; ValueError if there is none.

    Of the names of a tied parameter it is the one `named_canonical_parameters` chose: a name inside the base model.
    """
    chosen = [name for names in (_parameters(model), _buffers(model)) for name in _chosen_names(names)]
    mapping = {name.relative: name.full for name in chosen}
    if canonical_name not in mapping:
        raise _unknown_name(model, canonical_name, list(mapping))
    return mapping[canonical_name]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile, peft and the other wrappers of `families.WRAPPERS`, however deep."""
    while (attribute := _wrapped_attribute(model)) is not None:
        model = getattr(model, attribute)
    return model


def _wrapped_attribute(module: nn.Module) -> str | None:
    attributes = (WRAPPERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in WRAPPERS)
    return next(attributes, None)


def _base_prefix(model: nn.Module) -> str:
    """`"bert."` if the unwrapped `model` holds its base model as `bert`, else the empty string."""
    attribute = getattr(model, "base_model_prefix", "")
    return f"{attribute}." if attribute and isinstance(getattr(model, attribute, None), nn.Module) else ""


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Where the heads of an unwrapped model without a base model module are, each with a final dot."""
    if not isinstance(model, PreTrainedModel):
        return ()
    output = model.get_output_embeddings()
    # Without wrappers, because it is relative names that are compared with these.
    heads = [name for name, module in _unwrapped_modules(model) if output is not None and module is output]
    return tuple(f"{name}." for name in [*heads, *HEADS_WITHOUT_BASE])


def _unwrapped_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of `model` under each of its names, the components that wrappers add taken out."""
    names, stripped = {"": ""}, []
    for full, module in model.named_modules(remove_duplicate=False):
        if full:
            parent, _, attribute = full.rpartition(".")
            wrapped = _wrapped_attribute(model.get_submodule(parent)) == attribute
            names[full] = names[parent] if wrapped else f"{names[parent]}.{attribute}".lstrip(".")
        stripped.append((names[full], module))
    return stripped


def _named_tensors(model: nn.Module, kind: str) -> list[_Named]:
    """Every tensor of the dict `kind` (`_parameters` or `_buffers`) of every module, under each of its names."""
    inner = unwrap(model)
    prefix = _base_prefix(inner)
    heads = () if prefix else _head_prefixes(inner)
    full_modules = model.named_modules(remove_duplicate=False)
    named = []
    for (full_path, module), (path, _) in zip(full_modules, _unwrapped_modules(model), strict=True):
        for attribute, tensor in getattr(module, kind).items():
            if tensor is None:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            in_base = name.startswith(prefix) and not name.startswith(heads)
            relative = name.removeprefix(prefix)
            named.append(_Named(f"{full_path}.{attribute}".lstrip("."), relative, in_base, tensor))
    return named


def _parameters(model: nn.Module) -> list[_Named]:
    return _named_tensors(model, "_parameters")


def _buffers(model: nn.Module) -> list[_Named]:
    return _named_tensors(model, "_buffers")


def _chosen_names(names: list[_Named]) -> list[_Named]:
    """One name of each tensor, in the order of the chosen names."""
    best: dict[int, _Named] = {}
    for name in names:
        known = best.setdefault(id(name.tensor), name)
        if name.in_base and not known.in_base:
            best[id(name.tensor)] = name
    chosen = [name for name in names if best[id(name.tensor)] is name]
    taken: dict[str, _Named] = {}
    for name in chosen:
        if name.relative in taken:
            raise ValueError(
                f"Canonical names must be unique, but `{taken[name.relative].full}` and `{name.full}` would both be "
                f"`{name.relative}`: rename the head module, or pass the base model alone."
            )
        taken[name.relative] = name
    return chosen


def _unknown_name(model: nn.Module, name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    listed = ", ".join(f"`{choice}`" for choice in near)
    return ValueError(f"`{type(model).__name__}` has no parameter or buffer `{name}`: near names are {listed}.")
