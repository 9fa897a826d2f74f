"""y = x Wᵀ + b for W = W0 ⊙ S1 + scaling (U V + S2), without W."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.algorithms.sparse_update import linear_with_update, update_alone
from sparse_hf.dsee.weight_parts import whole_copy


if TYPE_CHECKING:
    from sparse_hf.dsee.layer import DseeLayer


def adapted_product(layer: "DseeLayer", x: Tensor, names: list[str]) -> Tensor:
    """The output of an adapted layer; S1 is in its frozen weight already.

    Args:
        x: shape (..., in).
        names: of the adapters in force; their updates add up.

    Returns:
        shape (..., out), in the dtype that the base layer alone would give.
    """
    result = _base_and_sparse(layer, x, [name for name in names if name in layer.sparse_hf_dsee_values])
    for name in names:
        if name in layer.sparse_hf_dsee_U:
            result = _plus_low_rank(layer, result, x, name)
    return result


def dense_update(layer: "DseeLayer", name: str, *, stepped: bool = False) -> Tensor:
    """scaling (U V + S2) as one matrix in the weight's layout, in the adapter's dtype.

    Where U, V and S2 are split, all ranks ask together.

    Args:
        stepped: of what the optimizer steps, as `whole_copy` has it.
    """
    update = torch.zeros(layer.weight_shape, device=layer.weight.device)
    if name in layer.sparse_hf_dsee_U:
        left, right = layer.sparse_hf_dsee_U[name], layer.sparse_hf_dsee_V[name]
        product = whole_copy(left, stepped=stepped) @ whole_copy(right, stepped=stepped)
        update = product.t().contiguous() if layer.input_first else product
    if name in layer.sparse_hf_dsee_values:
        values, indices = layer.sparse_hf_dsee_values[name], layer.sparse_hf_dsee_indices[name]
        values = whole_copy(values, stepped=stepped)
        update = update.flatten().index_add(0, indices, values.to(update.dtype)).view(layer.weight_shape)
    return update * layer.sparse_hf_dsee_scaling[name]


def merged_weight(layer: "DseeLayer", names: list[str], sparse: bool) -> tuple[Tensor, float]:
    """W in float32, and with `sparse` the share of its norm that S1 took; S1 is in the frozen weight already."""
    before = layer.get_base_weight()
    merged = before.float()
    for name in names:
        merged = merged + dense_update(layer, name).float()
    if not sparse:
        return merged, 0.0
    keep = layer.sparse_hf_dsee_baked.mask(before)
    taken = float(merged[~keep].norm() / merged.norm().clamp_min(1e-30))
    return merged.masked_fill(~keep, 0), taken


def _base_and_sparse(layer: "DseeLayer", x: Tensor, names: list[str]) -> Tensor:
    if not names:
        return layer.base_layer(x)
    scaled = [layer.sparse_hf_dsee_values[name] * layer.sparse_hf_dsee_scaling[name] for name in names]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _is_plain(layer):
        base, first = layer.get_base_layer(), layer.pattern(names[0])
        result = linear_with_update(x, base.weight, base.bias, scaled[0], first, input_first=layer.input_first)
        names, scaled = names[1:], scaled[1:]
    else:
        result = layer.base_layer(x)
        if layer.quantization_backend is not None:
            result = layer.quantization_backend.maybe_clone_base_result(result)
    for name, values in zip(names, scaled, strict=True):
        alone = update_alone(x, values, layer.pattern(name), layer.out_features, input_first=layer.input_first)
        result = result + alone.to(result.dtype)
    return result


def _is_plain(layer: "DseeLayer") -> bool:
    """Whether the base is nothing but its weight: not quantized, adapted, hooked, or given another forward."""
    base = layer.base_layer
    kinds = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    # ZeRO-3's own hooks bring weights for a call; it brings them for this layer too, when they are asked for.
    hooked = any(not str(hook.__module__).startswith("deepspeed.") for hooks in kinds for hook in hooks.values())
    return (
        layer.quantization_backend is None
        and base is layer.get_base_layer()
        and not hooked
        and "forward" not in vars(base)
    )


def _plus_low_rank(layer: "DseeLayer", result: Tensor, x: Tensor, name: str) -> Tensor:
    left, right = layer.sparse_hf_dsee_U[name], layer.sparse_hf_dsee_V[name]
    scaling, x = layer.sparse_hf_dsee_scaling[name], layer.sparse_hf_dsee_dropout[name](x)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(right.dtype)
    hidden = F.linear(x, right)
    if result.dtype != hidden.dtype:
        return result + (F.linear(hidden, left) * scaling).to(result.dtype)
    # One addition inside the product saves a pass over the output.
    flat = result.reshape(-1, result.shape[-1])
    return flat.addmm(hidden.reshape(-1, hidden.shape[-1]), left.t(), alpha=scaling).view(result.shape)
