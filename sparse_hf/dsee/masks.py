"""Which frozen weights does S1 keep?"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.n_m_selection import keep_n_of_m
from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.algorithms.shard_layout import ShardLayout
from sparse_hf.algorithms.sharded_tensors import sum_over_ranks
from sparse_hf.dsee.layer import DseeLayer
from sparse_hf.dsee.masking_config import Score
from sparse_hf.dsee.product import dense_update
from sparse_hf.dsee.weight_parts import is_split, run_of, whole_from_run


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, DseeLayer]:
    """The matrices that an adapter tunes or masks, by module name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DseeLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.sparse_hf_dsee_scaling}


@torch.no_grad()
def unstructured_masks(
    layers: Mapping[str, DseeLayer], adapter_name: str, sparsity: float, score: Score = "weight"
) -> dict[str, Tensor]:
    """S1 over whole groups: the tuned matrices by `score`, those that are only masked by |W0|.

    Weights whose score is 0 (before the first step, or with `r=0` nearly all) are ranked by |W0| behind the others.
    Each group reaches `sparsity` exactly (rounded to whole weights), ranked over all its matrices together, as in
    DSEE's released code (`ad_pruning_ratio`, `pruning_ratio`). That code ranks by |update| only; its sum with W0 has a
    precedence error, which is not repeated here.

    Where ranks hold parts of the matrices, each ranks its own part, and counts are added up; updates are multiplied
    out one whole matrix at a time.

    Args:
        sparsity: in [0, 1).

    Returns:
        bool masks in the weights' layouts, True = kept, whole.
    """
    tuned = {name for name, layer in layers.items() if _is_tuned(layer, adapter_name)}
    masks: dict[str, Tensor] = {}
    for group in (tuned, layers.keys() - tuned):
        names = [name for name in layers if name in group]
        if names:
            scores = [_score(layers[name], adapter_name, score if name in tuned else "weight") for name in names]
            members = [layers[name] for name in names]
            layout = _layout(members)
            count = sum(layout.numels)
            kept = _keep(scores, members, count - round(sparsity * count), names, layout)
            masks |= {name: _whole(one, layers[name]) for name, one in zip(names, kept, strict=True)}
    return masks


def _layout(layers: list[DseeLayer]) -> ShardLayout:
    """Of the matrices' parts that this rank holds: all of them, unless they are split."""
    runs = [run_of(layer.weight) for layer in layers]
    return ShardLayout(
        numels=tuple(math.prod(layer.weight_shape) for layer in layers),
        tensors=tuple(range(len(layers))),
        starts=tuple(0 if run is None else run.start for run in runs),
        all_reduce_sum=sum_over_ranks([layer.weight for layer in layers]),
    )


def _whole(mask: Tensor, layer: DseeLayer) -> Tensor:
    return whole_from_run(mask, layer.weight).view(layer.weight_shape) if is_split(layer.weight) else mask


def _keep(
    scores: list[Tensor], layers: list[DseeLayer], num_keep: int, names: list[str], layout: ShardLayout
) -> list[Tensor]:
    """The largest scores; where fewer than `num_keep` are not zero, the others by |W0| and not by their place."""
    nonzero = [one != 0 for one in scores]
    found = torch.tensor([sum(int(one.sum()) for one in nonzero)])
    free = num_keep - int(layout.all_reduce_sum(found))
    if free <= 0:
        return keep_largest(scores, num_keep, absolute=True, names=names, shards=layout)
    weights = [_weights(layer) for layer in layers]
    others = [~one for one in nonzero]
    options = {"min_per_tensor": 0, "absolute": True, "names": names, "shards": layout}
    filled = keep_largest(weights, free, candidates=others, **options)
    return [one | other for one, other in zip(nonzero, filled, strict=True)]


@torch.no_grad()
def n_m_masks(layers: Mapping[str, DseeLayer], pattern: str) -> dict[str, Tensor]:
    """S1 with N of every M weights kept along the input, by |W0|; `pattern` as "2:4"."""
    n, m = map(int, pattern.split(":"))
    return {
        name: keep_n_of_m(layer.frozen_weight(), n, m, dim=0 if layer.input_first else 1)
        for name, layer in layers.items()
    }


def mask_by_update(model: nn.Module, adapter_name: str, sparsity: float, score: Score = "update") -> None:
    """Choose S1 of a tuned adapter anew and put it in force; it is saved with the adapter.

    Args:
        model: a `PeftModel`, or a Transformers model with the adapter injected.

    Raises:
        ValueError: no such DSEE adapter, or a quantized base.
    """
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"The model has no DSEE adapter `{adapter_name}`: make one by `get_peft_model`.")
    for name, mask in unstructured_masks(layers, adapter_name, sparsity, score).items():
        layers[name].set_mask(adapter_name, mask)
    # What loads the adapter makes room for masks where its config says that there are some.
    model.peft_config[adapter_name].base_sparsity = sparsity


def _is_tuned(layer: DseeLayer, adapter_name: str) -> bool:
    return adapter_name in layer.sparse_hf_dsee_U or adapter_name in layer.sparse_hf_dsee_values


def _weights(layer: DseeLayer) -> Tensor:
    """W0 in float32, as much of it as this rank holds."""
    run = layer.frozen_run()
    return (layer.frozen_weight() if run is None else run.weights).float()


def _score(layer: DseeLayer, adapter_name: str, score: Score) -> Tensor:
    if score == "weight":
        return _weights(layer)
    # Whole, one matrix at a time; in bf16 ZeRO's masters, which a resumed run has too, and which tie less often.
    update = dense_update(layer, adapter_name, stepped=True).float()
    run = run_of(layer.weight)
    update = update if run is None else run.of(update).clone()
    return update if score == "update" else update.abs() + _weights(layer).abs()
