"""Which dense model says what a mixture of experts says, and what does its config look like?"""

from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparse_hf.moe.pairs import PAIRS, Pair
from sparse_hf.moe.read_mixture import StoredMixture
from sparse_hf.storage.shard_plan import PlannedTensor


# Entries about the choice of experts or of layers: whatever they say, a dense model need not say it.
ROUTING = (
    "decoder_sparse_step",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "moe_layer_interval",
    "n_group",
    "topk_group",
    "use_expert_bias",
)
# Entries that make `intermediate_size` mean the FFN's neurons where it would be a number to compute them from.
EXACT_WIDTH = {"lfm2": {"block_auto_adjust_ff_dim": False}}


def pair_of_mixture(mixture: StoredMixture, target: str | None, origin: Mapping[str, object]) -> Pair:
    """The pair that leads back to `target`, to where the mixture came from, or to the only dense model there is.

    Args:
        origin: what `read_origin` found.

    Raises:
        ValueError: there is no such pair, or nothing tells which.
    """
    model_type = mixture.target.model_type
    pairs = {one.source: one for ones in PAIRS.values() for one in ones if one.target.model_type == model_type}
    if target is None and origin.get("target_type") == model_type:
        target = origin.get("source_type")
    if target is None and len(pairs) == 1:
        return next(iter(pairs.values()))
    if target not in pairs:
        raise ValueError(
            f"`target` of a {model_type} mixture must be the dense architecture that it came from, one of "
            f"{', '.join(pairs)}, got {target!r:.80}."
        )
    return pairs[target]


def check_config(mixture: StoredMixture, pair: Pair) -> None:
    """Refuse entries that the dense model could not say, such as a window or weights that do not sum to 1.

    Raises:
        ValueError: there is one; it is named.
    """
    needed = {name: (value,) for name, value in {**pair.target.fixed, **pair.fixed}.items() if name not in ROUTING}
    needed |= {f"rope_parameters.{name}": (value,) for name, value in pair.target.rope.items()}
    # These are the dense model's, but an entry of one name means the same in both.
    needed |= {name: allowed for name, (allowed, _) in pair.required.items() if name not in needed}
    for name, allowed in needed.items():
        there, value = _entry(mixture.config, name)
        if there and any(one not in allowed for one in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"A {mixture.target.model_type} mixture becomes {pair.source} only if `{name}` is {allowed[0]!r}, got "
                f"{value!r:.80}: the dense model could not say that and would compute something else."
            )


def dense_config(mixture: StoredMixture, pair: Pair) -> PreTrainedConfig:
    """The config of the dense model."""
    config, kind = mixture.config, CONFIG_MAPPING[pair.source]
    plain, carried = kind(), (*pair.target.carried, *pair.carried)
    values = {name: getattr(config, name) for name in carried if hasattr(config, name) and hasattr(plain, name)}
    head = getattr(config, "head_dim", None)
    if head is not None and head != config.hidden_size // config.num_attention_heads:
        values["head_dim"] = head  # not every family has an entry for what is usually a quotient
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {name: value for name, value in rope.items() if name not in pair.target.rope}
    values |= {"intermediate_size": getattr(config, pair.target.width), **EXACT_WIDTH.get(pair.source, {})}
    values |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[pair.source]], "dtype": config.dtype}
    return kind(**_with_required(kind(**values), values, pair))


def check_tensors(tensors: Sequence[PlannedTensor], config: PreTrainedConfig) -> None:
    """Compare names and shapes with those of Transformers' class, which is built without memory to ask it.

    Raises:
        ValueError: they differ: the mixture has something that the dense model has not, or the reverse.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    planned = {tensor.name: list(tensor.shape) for tensor in tensors}
    if config.tie_word_embeddings and "lm_head.weight" not in planned:
        expected.pop("lm_head.weight", None)
    for name in sorted(expected.keys() | planned.keys()):
        if expected.get(name) != planned.get(name):
            raise ValueError(
                f"`{name}` of a {config.model_type} model must be {expected.get(name, 'absent')}, and the mixture "
                f"gives {planned.get(name, 'nothing')}: the dense model cannot say what the mixture says."
            )


def _with_required(dense: PreTrainedConfig, values: Mapping[str, object], pair: Pair) -> dict[str, object]:
    """What the mixture could not say has the value that it must have had, not the dense family's default."""
    values = dict(values)
    for name, (allowed, _) in pair.required.items():
        first, _, rest = name.partition(".")
        _, value = _entry(dense, name)
        if all(one in allowed for one in (value if isinstance(value, list) else [value])):
            continue
        if rest:
            values[first] = {**values.get(first, {}), rest: allowed[0]}
        else:
            values[first] = [allowed[0]] * len(value) if isinstance(value, list) else allowed[0]
    return values


def _entry(config: PreTrainedConfig, name: str) -> tuple[bool, object]:
    """Whether there is an entry, or a part of one after a dot, and its value."""
    first, _, rest = name.partition(".")
    value = getattr(config, first, None)
    if not rest:
        return hasattr(config, first), value
    return isinstance(value, dict) and rest in value, value.get(rest) if isinstance(value, dict) else None
