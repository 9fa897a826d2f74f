"""How does a model run with one decoder layer in memory at a time?

Transformers' own class does the work: it is built whole without memory (on the meta device), all layers but one are
replaced by stand-ins that have no weights, and only that layer's tensors are loaded. So masks, positions, layer types
and the conversion of weights are those of the full model, with no code per family.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


@dataclass(frozen=True)
class LayeredCheckpoint:
    """What must be known of a model before its layers are loaded."""

    one_layer_class: type[PreTrainedModel]
    config: PreTrainedConfig
    count: int = field(metadata={"help": "Of layers."})
    layers: str = field(metadata={"help": "Name of the module that lists them."})
    layer_name: re.Pattern = field(metadata={"help": "Of a layer's tensors on disk; the group is its index."})
    embedding_name: re.Pattern
    head_name: re.Pattern
    tensors: tuple[StoredTensor, ...]

    def tensors_for(self, layer: int, with_embedding: bool, with_head: bool) -> list[StoredTensor]:
        """The layer's own, and what belongs to no layer, such as the last norm."""
        chosen = []
        for tensor in self.tensors:
            found = self.layer_name.match(tensor.name)
            # A layer that the model does not have goes with every other, so that it is found to be unexpected.
            foreign = found and int(found[1]) != layer and int(found[1]) < self.count
            unwanted = (not with_embedding and self.embedding_name.match(tensor.name)) or (
                not with_head and self.head_name.match(tensor.name)
            )
            if not foreign and not unwanted:
                chosen.append(tensor)
        return chosen


def layered_checkpoint(folder: Path, config: PreTrainedConfig) -> LayeredCheckpoint:
    """Reads headers only; `config` is not changed.

    Raises:
        FileNotFoundError, ValueError: the files are missing or damaged; or the model has no list of decoder layers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = model.config.get_text_config().num_hidden_layers
    names = {module: name for name, module in model.named_modules()}
    lists = [name for one, name in names.items() if isinstance(one, nn.ModuleList) and len(one) == count]
    if not lists:
        raise ValueError(f"A {config.model_type} model has no list of its {count} layers, and cannot be run by layer.")
    base = f"{model.base_model_prefix}."  # which a checkpoint of the bare model lacks

    def stored(name: str, rest: str = "") -> re.Pattern:
        return re.compile(f"(?:{re.escape(base)})?{re.escape(name.removeprefix(base))}\\.{rest}")

    return LayeredCheckpoint(
        one_layer_class=_one_layer_class(type(model), lists[0]),  # the first is the outermost
        config=model.config,
        count=count,
        layers=lists[0],
        layer_name=stored(lists[0], r"(\d+)\."),
        embedding_name=stored(names[model.get_input_embeddings()]),
        head_name=stored(names[model.get_output_embeddings()]),
        tensors=tuple(read_headers(folder).values()),
    )


def run_layers(model: LayeredCheckpoint, ids: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The hidden states that each layer returns, then the logits: [batch, length, hidden or vocabulary].

    Between two of them nothing of the model is in memory but the states.

    Args:
        ids: [batch, length].
        dtype: weights are converted to it and computed in.

    Raises:
        ValueError: missing, unexpected or mismatched weights.
        RuntimeError: Transformers cannot convert the weights, as one expert of several is missing.
    """
    states = logits = None
    for number in range(model.count):
        states, logits = LoadedLayer(model, number, dtype).run(states, input_ids=ids)
        yield states
    yield logits


class LoadedLayer:
    """One decoder layer, with the embeddings before the first and the norm and the head after the last.

    Attributes:
        module: the layer itself.
    """

    def __init__(self, model: LayeredCheckpoint, number: int, dtype: torch.dtype) -> None:
        """
        Args:
            number: of the layer, from 0.
            dtype: weights are converted to it and computed in.

        Raises:
            ValueError: missing, unexpected or mismatched weights.
            RuntimeError: Transformers cannot convert the weights, as one expert of several is missing.
        """
        self._part = _load_layer(model, number, dtype)
        self._stand_ins = [module for module in self._part.modules() if isinstance(module, _Given)]
        self.module: nn.Module = self._part.get_submodule(model.layers)[number]

    def run(self, states: Tensor | None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that the layer returns, and the model's logits, which mean something after the last one.

        Args:
            states: [batch, length, hidden], what the layer before returned; None for the first.
            inputs: of the model, such as `input_ids`, [batch, length], and `attention_mask`.
        """
        returned: list = []
        for stand_in in self._stand_ins:
            stand_in.states = states
        hook = self.module.register_forward_hook(lambda _, given, output: returned.append(output))
        try:
            logits = self._part(**inputs, use_cache=False).logits
        finally:
            hook.remove()
            for stand_in in self._stand_ins:
                stand_in.states = None
        (output,) = returned
        return output if isinstance(output, Tensor) else output[0], logits


class _Given(nn.Module):
    """Stands for a layer, the embeddings or the head: gives the hidden states that the loaded layer is to get.

    Without any, before the first layer, it passes on what it received.
    """

    states: Tensor | None = None

    def forward(self, received: Tensor, *args: object, **kwargs: object) -> Tensor:
        return received if self.states is None else self.states


def _one_layer_class(model_class: type[PreTrainedModel], layers: str) -> type[PreTrainedModel]:
    """The class, but with stand-ins for all layers but one and for the embeddings and the head if not wanted.

    `from_pretrained` would fill what it finds no weights for, so the class must have no more than what is loaded. It
    keeps name and module, by which Transformers finds the conversion of weights.
    """

    def __init__(
        self: PreTrainedModel,
        config: PreTrainedConfig,
        layer: int,
        with_embedding: bool,
        with_head: bool,
    ) -> None:
        model_class.__init__(self, config)
        modules = self.get_submodule(layers)
        for other in set(range(len(modules))) - {layer}:
            modules[other] = _Given()
        if not with_embedding:
            self.set_input_embeddings(_Given())
        if not with_head:
            self.set_output_embeddings(_Given())

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _load_layer(model: LayeredCheckpoint, layer: int, dtype: torch.dtype) -> PreTrainedModel:
    """Whole in structure; of weights it has the layer's, the last norm, and embeddings or head where they are used."""
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    with_head = layer == model.count - 1
    tied = with_head and text_config.tie_word_embeddings
    # Tying elsewhere would look for the weights of a stand-in.
    config.tie_word_embeddings = text_config.tie_word_embeddings = tied
    with_embedding = layer == 0 or tied
    with _without_loading_bars():
        part, info = model.one_layer_class.from_pretrained(
            None,
            layer,
            with_embedding,
            with_head,
            config=config,
            state_dict=_read(model.tensors_for(layer, with_embedding, with_head)),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are found below
            output_loading_info=True,
        )
    wrong = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(
            f"Layer {layer} of the {config.model_type} model does not load as it should: {wrong!r:.300}. Its config "
            "and its weights do not belong together."
        )
    return part


def _read(tensors: Iterable[StoredTensor]) -> dict[str, Tensor]:
    names: dict[Path, list[str]] = {}
    for tensor in tensors:
        names.setdefault(tensor.file, []).append(tensor.name)
    found = {}
    for file, wanted in names.items():
        with safe_open(file, framework="pt") as stream:
            found |= {name: stream.get_tensor(name) for name in wanted}
    return found


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    """Transformers shows a bar per load, here: per layer."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
