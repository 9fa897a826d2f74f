"""Structured S1: which heads does the update use least, and a model without them that goes on tuning."""

import copy
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sparse_hf.algorithms.bits import unpack_bits
from sparse_hf.algorithms.supports import largest_support
from sparse_hf.algorithms.unit_selection import select_units
from sparse_hf.anatomy.modeling_slim import Slice, unit_slices
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units, table_of
from sparse_hf.dsee.layer import DseeLayer
from sparse_hf.dsee.masks import adapted_layers
from sparse_hf.dsee.model import dsee_sparsity


@dataclass
class _Adapted:
    """What an adapter holds of one matrix, in the weight's layout."""

    left: Tensor | None
    right: Tensor | None
    support: Tensor | None  # bool
    values: Tensor | None  # dense, zero outside of the support
    mask: Tensor | None  # bool

    def cut(self, part: Slice, input_first: bool) -> "_Adapted":
        """Without the rows or columns that are cut from the weight."""
        of_output = part.axis == (1 if input_first else 0)
        dense = [None if one is None else one.index_select(part.axis, part.index) for one in self._dense()]
        left, right = self.left, self.right
        if left is not None and of_output:
            left = left.index_select(0, part.index)
        if right is not None and not of_output:
            right = right.index_select(1, part.index)
        return _Adapted(left, right, *dense)

    def _dense(self) -> tuple[Tensor | None, ...]:
        return self.support, self.values, self.mask


def heads_by_update(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """How much the update uses each head: the sum of |scaling (U V + S2)| over its rows of the tuned projections.

    As in DSEE's released code, where these are query and value. With grouped-query attention a head is a key/value
    head with the query heads that share it.

    Args:
        model: a `PeftModel` around a Transformers model of a family with a table of units.

    Returns:
        float32 scores by unit key (`encoder.layer.0.heads`), shape (heads,).

    Raises:
        ValueError: no such adapter, an unknown family, or a layer in which nothing that makes heads is tuned.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = adapted_layers(inner, adapter_name)
    table, stock = table_of(inner), _plain(inner)
    counts = {one.key: one.count for one in find_units(inner, table)}
    scores = {}
    for key, count in counts.items():
        if not key.endswith(".heads"):
            continue
        path = key.removesuffix(".heads")
        names = [name for name in layers if any(name.endswith(f"{path}.{one}") for one in table.head_projections)]
        if not names:
            raise ValueError(
                f"Heads are scored by the updates of {', '.join(table.head_projections)}, but none of them is tuned "
                f"in `{path}`: name one in `target_modules`."
            )
        scores[key] = torch.zeros(count)
        updates = {name: layers[name].get_delta_weight(adapter_name).detach() for name in names}
        for head in range(count):
            # All parts of a head, however they are fused, by the table.
            kept = {other: torch.tensor([head] if other == key else [0]) for other in counts}
            slices = unit_slices(stock, table, kept)
            for name, update in updates.items():
                part = slices[f"{name}.weight"]
                scores[key][head] += update.index_select(part.axis, part.index.to(update.device)).abs().sum().cpu()
    return scores


def cut_heads(model: PeftModel, fraction: float, adapter_name: str = "default") -> PeftModel:
    """A smaller `PeftModel` without the heads that the update uses least, of each layer the same share.

    Heads are cut from the frozen weights for real. U, V, S1 and those entries of S2 that lie in what stays are carried
    over; S2's lost entries begin anew at the largest free weights, so that it has `nnz` again. Train on from there,
    with a new optimizer, and save the base beside the adapter: it is another model now.

    Args:
        model: with one DSEE adapter; it is unloaded and must not be used afterwards.
        fraction: share of the heads of every layer to cut, rounded; at least one stays.

    Raises:
        ValueError: see `heads_by_update`; a fraction that empties a layer; more than one adapter.
    """
    if list(model.peft_config) != [adapter_name]:
        raise ValueError(f"Heads are cut under one adapter, got {', '.join(model.peft_config)}: delete the others.")
    scores = heads_by_update(model, adapter_name)
    kept = dict(zip(scores, select_units(list(scores.values()), fraction, "layer"), strict=True))
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.base_fingerprint, config.inference_mode = None, False
    config.support = "magnitude"  # of the entries that begin anew
    layers = adapted_layers(model.get_base_model(), adapter_name)
    held = {name: _held(layer, adapter_name) for name, layer in layers.items()}
    stock = _plain(model.get_base_model())
    table = table_of(stock)
    units = find_units(stock, table)
    kept |= {one.key: torch.ones(one.count, dtype=torch.bool) for one in units if one.key not in kept}
    slices = unit_slices(stock, table, {key: mask.nonzero().flatten() for key, mask in kept.items()})
    _check_room(layers, adapter_name, slices)
    if config.base_pattern or config.base_sparsity:
        config.base_pattern, config.base_sparsity = None, dsee_sparsity(model).base or 0.5  # room for the old masks
    base = model.unload()
    smaller = get_peft_model(cut_units(base, kept, table), config, adapter_name)
    for name, layer in adapted_layers(smaller.get_base_model(), adapter_name).items():
        part = slices.get(f"{name}.weight")
        _fill(layer, adapter_name, held[name] if part is None else held[name].cut(part, layer.input_first))
    return smaller


def _check_room(layers: dict[str, DseeLayer], adapter: str, slices: dict[str, Slice]) -> None:
    """While the model is still whole."""
    for name, layer in layers.items():
        part = slices.get(f"{name}.weight")
        if part is not None and adapter in layer.sparse_hf_dsee_values:
            left = layer.weight.numel() // layer.weight.shape[part.axis] * len(part.index)
            if layer.sparse_hf_dsee_values[adapter].numel() > left:
                raise ValueError(
                    f"`nnz` must be at most {left}, what the cut leaves of `{name}`, got "
                    f"{layer.sparse_hf_dsee_values[adapter].numel()}: cut fewer heads."
                )


def _plain(model: nn.Module) -> nn.Module:
    """As `model`, with stock layers where adapters are, on no device: enough for a table to be read against."""
    with torch.device("meta"):
        return type(model)(model.config)


@torch.no_grad()
def _held(layer: DseeLayer, adapter: str) -> _Adapted:
    support = values = mask = None
    if adapter in layer.sparse_hf_dsee_values:
        indices = layer.sparse_hf_dsee_indices[adapter].long()
        own = layer.sparse_hf_dsee_values[adapter].detach()
        shape = layer.weight_shape
        support = torch.zeros(shape, dtype=torch.bool, device=own.device).flatten().index_fill(0, indices, True)
        values = torch.zeros(shape, dtype=own.dtype, device=own.device).flatten().index_put((indices,), own)
        support, values = support.view(shape), values.view(shape)
    if adapter in layer.sparse_hf_dsee_mask:
        mask = unpack_bits(layer.sparse_hf_dsee_mask[adapter], layer.weight_shape)
    pair = [
        one[adapter].detach().clone() if adapter in one else None
        for one in (layer.sparse_hf_dsee_U, layer.sparse_hf_dsee_V)
    ]
    return _Adapted(*pair, support, values, mask)


@torch.no_grad()
def _fill(layer: DseeLayer, adapter: str, held: _Adapted) -> None:
    if held.left is not None and held.right is not None:
        layer.sparse_hf_dsee_U[adapter].copy_(held.left)
        layer.sparse_hf_dsee_V[adapter].copy_(held.right)
    if held.support is not None and held.values is not None:
        own = layer.sparse_hf_dsee_values[adapter]
        scores = layer.frozen_weight().detach().float().abs()
        # Entries that stay come first, whatever their size; the rest by the size of the weight.
        scores = torch.where(held.support, scores + 2 * scores.max() + 1, scores)
        places = largest_support(scores, own.numel()).to(own.device)
        layer.set_support(adapter, places)
        own.copy_(held.values.flatten()[places])
    if held.mask is not None:
        layer.set_mask(adapter, held.mask)
