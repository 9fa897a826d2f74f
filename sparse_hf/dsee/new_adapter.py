"""What does a new adapter hold in a matrix, before its support and mask are chosen or loaded?"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.sparse_update import index_dtype
from sparse_hf.dsee.config import DseeConfig


if TYPE_CHECKING:
    from sparse_hf.dsee.layer import DseeLayer


V_DEVIATION = 0.02  # of V's normal start, as in the released code


def make_room(layer: "DseeLayer", name: str, config: DseeConfig, tuned: bool, generator: torch.Generator) -> None:
    """Add an adapter's tensors: U at 0, V at random, S2's values at 0 at placeholder indices, S1 keeping everything.

    Args:
        tuned: whether the matrix gets U V and S2, or S1 alone.
        generator: of V, and of the rest where `config.init_weights` is False.

    Raises:
        ValueError: `nnz` is larger than the matrix.
    """
    shape = layer.weight_shape
    numel = math.prod(shape)
    if tuned and config.r:
        left, right = torch.zeros(layer.out_features, config.r), torch.empty(config.r, layer.in_features)
        right.normal_(std=V_DEVIATION, generator=generator)
        layer.sparse_hf_dsee_U[name] = _parameter(left, config, generator)
        layer.sparse_hf_dsee_V[name] = nn.Parameter(right)
        layer.sparse_hf_dsee_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
    if tuned and config.nnz:
        if config.nnz > numel:
            raise ValueError(
                f"`nnz` must be at most {numel}, the weights of a target matrix of shape {shape}, got {config.nnz}: "
                "lower it or leave that module out."
            )
        layer.sparse_hf_dsee_values[name] = _parameter(torch.zeros(config.nnz), config, generator)
        layer.sparse_hf_dsee_indices[name] = torch.arange(config.nnz, dtype=index_dtype(shape))
    if config.base_sparsity or config.base_pattern:
        everything = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8)
        everything[-1] = 255 >> (-numel % 8)  # spare bits are zero
        layer.sparse_hf_dsee_mask[name] = everything
    layer.sparse_hf_dsee_scaling[name] = config.scaling


def _parameter(start: Tensor, config: DseeConfig, generator: torch.Generator) -> nn.Parameter:
    if not config.init_weights:
        start.normal_(std=V_DEVIATION, generator=generator)
    return nn.Parameter(start)
