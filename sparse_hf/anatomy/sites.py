"""The matrices of a Transformers model that can be made sparse, wherever they are stored."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.anatomy.canonical_names import canonical_names, head_names, named_canonical_parameters
from sparse_hf.anatomy.families import (
    ADAPTER_PREFIXES,
    EXPERT_CLASSES,
    OTHER_MATRICES,
    QUANTISED_PARAMETERS,
    RELATIVE_POSITIONS,
    ROUTER_ATTRIBUTES,
    ROUTER_BESIDE_EXPERTS,
    ROUTER_CLASSES,
    TRANSPOSED_EXPERT_CLASSES,
)


@dataclass(frozen=True)
class Site:
    """One weight matrix: a whole 2-D parameter, or one expert's slice of a 3-D one.

    `name` is canonical: `encoder.layer.0.attention.self.query.weight`, `layers.0.mlp.experts.gate_up_proj[3]`.
    `parameter` is the canonical name of the parameter that stores it; masks are keyed by it and have its shape.
    `shape` is (out_features, in_features), also where the parameter is stored as (in, out), which `transposed` tells.
    Embeddings, where a pattern asks for them, have `shape` (rows, width), as stored.
    """

    name: str
    parameter: str
    expert: int | None
    shape: tuple[int, int]
    transposed: bool

    def part(self, tensor: Tensor) -> Tensor:
        """This site's part of `tensor`, which is shaped like the parameter: a view, 2-D, in the stored orientation.

        Raises ValueError if `tensor` is not shaped like the parameter.
        """
        fits = tensor.ndim == 2 if self.expert is None else tensor.ndim == 3 and self.expert < tensor.shape[0]
        stored = self.shape[::-1] if self.transposed else self.shape
        if not fits or tuple(tensor.shape[-2:]) != stored:
            wanted = stored if self.expert is None else ("experts", *stored)
            raise ValueError(
                f"The part for `{self.name}` is taken from a tensor shaped like `{self.parameter}`, {wanted}, "
                f"but this one has shape {tuple(tensor.shape)}: pass that parameter, its gradient or its mask."
            )
        return tensor if self.expert is None else tensor[self.expert]


class _Matrix(NamedTuple):
    """A candidate site, with what decides whether it is taken."""

    site: Site
    default: bool
    tensor: Tensor


class _Owner(NamedTuple):
    """A module that holds a parameter, directly, as `attribute`."""

    path: str
    module: nn.Module
    attribute: str


def find_sites(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> list[Site]:
    """The sites of `model`, in model order; the experts of one parameter by index; a shared matrix once.

    By default these are the matrices of all linear layers of the base model: `nn.Linear`, Conv1D (a fused qkv is one
    site) and experts, poolers inside the base model included. Excluded are task heads and output embeddings (tied or
    not), routers, embeddings, relative position embeddings, convolutions, LoRA matrices, and whatever is no matrix
    (biases, norms). On BERT-base this is the prunable set of BERT-Tickets: the encoder and the pooler, 85,524,480
    weights.

    Args:
        include: shell-style pattern or patterns that replace the default set: every matrix whose site name or
            parameter name matches one is taken, embeddings, heads and routers too. `[3]` or `[*]` at the end of a
            pattern is an expert's index, elsewhere brackets are a set of characters.
        exclude: pattern or patterns of what is left out of the default or the included set.

    Raises ValueError if a pattern matches nothing, if no site is left, or if the weights of one are quantised.
    """
    matrices = _find_matrices(model)
    includes, excludes = _as_patterns(include), _as_patterns(exclude)
    site_names = [name for matrix in matrices for name in (matrix.site.name, matrix.site.parameter)]
    _require_matches("include", includes, site_names)
    # A tied `lm_head.weight` may be excluded, though it goes by another name.
    _require_matches("exclude", excludes, [*site_names, *canonical_names(model)])
    chosen = [
        matrix
        for matrix in matrices
        if (matrix.default if include is None else _matches(matrix.site, includes))
        and not _matches(matrix.site, excludes)
    ]
    if not chosen:
        raise ValueError(
            f"A sparse model needs at least one site, but `{type(model).__name__}` has none (looked for: nn.Linear, "
            "Conv1D and experts of the base model, or what `include` matches, less what `exclude` matches): check the "
            "patterns, or name matrices in `include`."
        )
    _require_floating(chosen)
    return [matrix.site for matrix in chosen]


def _find_matrices(model: nn.Module) -> list[_Matrix]:
    """Every parameter that is one matrix or one per expert, in model order."""
    heads = head_names(model).parameters
    owners = _find_owners(model)
    routers = _find_routers(model)
    matrices = []
    for name, parameter in named_canonical_parameters(model).items():
        if name.endswith("bias"):  # gpt_oss: `experts.gate_up_proj_bias` is 2-D, one row per expert
            continue
        shape = whole_shape(parameter)
        stacked = len(shape) == 3 and any(_is_expert_module(owner.module) for owner in owners[name])
        if len(shape) != 2 and not stacked:
            continue
        layouts = [_stored_transposed(owner, stacked) for owner in owners[name]]
        linear = None not in layouts  # else an embedding (tied or not), or a parameter of no known layer
        default = linear and name not in heads and not any(_is_excluded(owner, routers) for owner in owners[name])
        sites = _make_sites(name, shape, transposed=linear and bool(layouts[0]))
        matrices.extend(_Matrix(site, default, parameter) for site in sites)
    return matrices


def _make_sites(name: str, stored_shape: tuple[int, ...], transposed: bool) -> list[Site]:
    shape = stored_shape[-2:][::-1] if transposed else stored_shape[-2:]
    if len(stored_shape) == 2:
        return [Site(name, name, None, shape, transposed)]
    return [Site(f"{name}[{expert}]", name, expert, shape, transposed) for expert in range(stored_shape[0])]


def _find_owners(model: nn.Module) -> dict[str, list[_Owner]]:
    """The modules that hold each parameter, by its canonical name; more than one if it is tied or shared."""
    canonical = canonical_names(model)
    owners: dict[str, list[_Owner]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = canonical[f"{path}.{attribute}".lstrip(".")]
                owners.setdefault(name, []).append(_Owner(path, module, attribute))
    return owners


def _find_routers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that choose or weigh experts, each with a final dot."""
    routers = []
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        by_class = any(part in type(module).__name__ for part in ROUTER_CLASSES)
        beside_experts = attribute == ROUTER_BESIDE_EXPERTS and "experts" in model.get_submodule(parent)._modules
        if by_class or attribute in ROUTER_ATTRIBUTES or beside_experts:
            routers.append(f"{path}.")
    return tuple(routers)


def _is_expert_module(module: nn.Module) -> bool:
    return any(part in type(module).__name__ for part in EXPERT_CLASSES)


def _stored_transposed(owner: _Owner, stacked: bool) -> bool | None:
    """Whether the owner's matrix is stored as (in, out); None if it is not the matrix of a linear layer."""
    class_names = {cls.__name__ for cls in type(owner.module).__mro__}
    if stacked:
        return bool(getattr(owner.module, "is_transposed", not class_names.isdisjoint(TRANSPOSED_EXPERT_CLASSES)))
    if owner.attribute == "weight" and isinstance(owner.module, nn.Linear):
        return False
    if owner.attribute == "weight" and isinstance(owner.module, Conv1D):
        return True
    known = (OTHER_MATRICES[name] for name in class_names if name in OTHER_MATRICES)
    return next(known, {}).get(owner.attribute)


def _is_excluded(owner: _Owner, routers: tuple[str, ...]) -> bool:
    parts = owner.path.split(".")
    by_name = any(part in RELATIVE_POSITIONS or part.startswith(ADAPTER_PREFIXES) for part in parts)
    return by_name or f"{owner.path}.".startswith(routers)


def _as_patterns(patterns: str | Sequence[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def _matches_name(name: str, pattern: str) -> bool:
    literal_index = re.sub(r"\[(\d+|\*)\]$", r"[[]\1]", pattern)
    return name == pattern or fnmatchcase(name, literal_index)


def _matches(site: Site, patterns: list[str]) -> bool:
    return any(_matches_name(name, pattern) for pattern in patterns for name in (site.name, site.parameter))


def _require_matches(argument: str, patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches_name(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, list(dict.fromkeys(names)), n=5, cutoff=0.0)
            listed = ", ".join(f"`{name}`" for name in near) or "none, the model has no matrix"
            raise ValueError(
                f"Every pattern of `{argument}` must match a matrix, but `{pattern}` matches none: "
                f"near names are {listed}."
            )


def _require_floating(chosen: list[_Matrix]) -> None:
    for matrix in chosen:
        dtype = matrix.tensor.dtype
        # One byte per weight or less (int8, float8) is storage for inference; packed classes lie about their dtype.
        quantised = not dtype.is_floating_point or dtype.itemsize < 2
        if quantised or type(matrix.tensor).__name__ in QUANTISED_PARAMETERS:
            raise ValueError(
                f"Sparse weights must be floating point numbers of at least 16 bits, but `{matrix.site.name}` is "
                f"quantised ({dtype}): load the model unquantised, or leave this weight out with `exclude`."
            )
