"""What would be written for a dense checkpoint, and of which sources? One function for each kind of target."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparse_hf.moe.expert_init import cut_of
from sparse_hf.moe.generic_experts import check_init
from sparse_hf.moe.generic_families import STORED_FEED_FORWARDS
from sparse_hf.moe.generic_plan import generic_config, generic_tensors
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.pairs import Pair, target_values
from sparse_hf.moe.upcycling_plan import check_branches, plan_tensors, split_rows
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


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
    if mixture.routing is not None:
        raise ValueError(
            f"{pair.target.model_type} has a router of its own: `router` is for mixtures of ours "
            f"({', '.join(STORED_FEED_FORWARDS)}), leave it out."
        )
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
        ValueError: a checkpoint is damaged, the branches differ, or what only stock targets have is asked for.
    """
    check_init(mixture.init)
    experts, top_k, routing = mixture.experts, mixture.top_k, mixture.routing or RouterConfig()
    cut_of(mixture.init, pair.target, 1, experts, top_k)
    made = generic_config(config, experts, top_k, layers, routing)
    headers, *more = sources = [read_headers(one) for one in folders]
    check_branches(headers, more)
    for one in folders[1:]:
        _check_alike(_architecture(config), _architecture(AutoConfig.from_pretrained(one)), one)
    tensors = generic_tensors(headers, config, layers, mixture, more, average)
    by_experts = routing.kind == "expert_choice" and routing.capacity_factor
    return Conversion(sources, tensors, made, by_experts or top_k)


def untied(made: Conversion) -> Conversion:
    """The same stock mixture with output embeddings of its own, a copy of the input's if they are tied.

    Those that are stored already stay: Transformers reads them even if the config ties them, unless they are equal.
    """
    made.config.tie_word_embeddings = False
    held = {tensor.name: tensor for tensor in made.tensors}
    if OUTPUT in held:
        return made
    return made._replace(tensors=[*made.tensors, dataclasses.replace(held[INPUT], name=OUTPUT)])


def _architecture(config: PreTrainedConfig) -> dict[str, object]:
    """The entries of a dense config that only its family has and that say what a trained model computes."""
    own = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    idle = re.compile("drop|initializer|summary|use_cache")
    return {"model_type": config.model_type} | {
        name: value for name, value in config.to_dict().items() if name in own and not idle.search(name)
    }


def _check_alike(ours: Mapping[str, object], theirs: Mapping[str, object], branch: Path) -> None:
    """Branches must be one architecture; tokens that begin, end or pad a text may differ."""
    differing = [name for name in ours if not name.endswith("_token_id") and ours[name] != theirs.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"All models must have one architecture, but `{name}` is {ours[name]!r} in the source and "
            f"{theirs.get(name)!r} in `{branch}`: take models that were fine-tuned from one."
        )
