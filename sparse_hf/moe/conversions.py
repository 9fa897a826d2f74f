"""What would be written for a dense checkpoint, and of which sources? One function for each kind of target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparse_hf.moe.expert_init import ExpertInit, cut_of
from sparse_hf.moe.generic_plan import generic_config, generic_tensors
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.pairs import Pair, target_values
from sparse_hf.moe.upcycling_plan import check_branches, plan_tensors, split_rows
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


class Conversion(NamedTuple):
    """What a mixture consists of.

    Attributes:
        sources: the tensors of each source.
        tensors: of the mixture.
        config: of the mixture.
        ffns_per_token: what a token passes in a mixture, in dense FFNs.
    """

    sources: list[Mapping[str, StoredTensor]]
    tensors: list[PlannedTensor]
    config: PreTrainedConfig
    ffns_per_token: float


def native_conversion(
    folders: Sequence[Path],
    config: PreTrainedConfig,
    pair: Pair,
    mixture: Mixture,
    layers: frozenset[int],
    average: bool,
) -> Conversion:
    """To a stock architecture.

    Args:
        folders: the source, then the branches if there are any.
        config: of the source.
        layers: which layers become mixtures.
        average: whether what is no expert is the branches' mean.

    Raises:
        ValueError: a checkpoint is damaged, the branches differ, or the numbers do not fit.
    """
    headers, *more = sources = [split_rows(read_headers(one), pair, config) for one in folders]
    check_branches(headers, more)
    tensors = plan_tensors(headers, mixture, layers, more, average)
    dense = tuple(sorted(set(range(config.num_hidden_layers)) - layers))
    neurons = headers[f"model.layers.{min(layers)}.mlp.gate_proj.weight"].shape[0]
    cut = cut_of(mixture.init, pair.target, neurons, mixture.experts, mixture.top_k)
    values = target_values(pair, config, cut, mixture.top_k, dense)
    for one in folders[1:]:
        theirs = target_values(pair, AutoConfig.from_pretrained(one), cut, mixture.top_k, dense)
        _check_alike(values, theirs, one)
    made = CONFIG_MAPPING[pair.target.model_type](**values, dtype=config.dtype)
    return Conversion(sources, tensors, made, (mixture.top_k * cut.width + cut.shared) / neurons)


def generic_conversion(
    folders: Sequence[Path],
    config: PreTrainedConfig,
    pair: Pair,
    mixture: Mixture,
    layers: frozenset[int],
    average: bool,
) -> Conversion:
    """To our own architecture, for families that have no mixture of experts; arguments as of `native_conversion`.

    Raises:
        ValueError: a checkpoint is damaged, or what only stock targets have is asked for.
    """
    if mixture.init != ExpertInit() or len(folders) > 1 or average:
        raise ValueError(
            f"A {config.model_type} model becomes a mixture of copies: leave `init`, `branches` and `average` out."
        )
    experts, top_k = mixture.experts, mixture.top_k
    cut_of(mixture.init, pair.target, 1, experts, top_k)
    headers = read_headers(folders[0])
    tensors = generic_tensors(headers, config, layers, experts, mixture.router)
    return Conversion([headers], tensors, generic_config(config, experts, top_k, layers), top_k)


def _check_alike(ours: Mapping[str, object], theirs: Mapping[str, object], branch: Path) -> None:
    """Branches must be one architecture; tokens that begin, end or pad a text may differ."""
    differing = [name for name in ours if not name.endswith("_token_id") and ours[name] != theirs.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"All models must have one architecture, but `{name}` is {ours[name]!r} in the source and "
            f"{theirs.get(name)!r} in `{branch}`: take models that were fine-tuned from one."
        )
