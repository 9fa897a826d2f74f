"""A mixture of experts in the place of a dense FFN.

Like `modeling_mixture.py`, beside which it is copied, this file needs torch and transformers only.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations import use_experts_implementation
from transformers.pytorch_utils import Conv1D

from .mixture_routers import (
    CosineRouter,
    HashRouter,
    MixtureRouter,
    RouterConfig,
    experts_by_logits,
    tokens_by_experts,
    within_capacity,
)


@dataclass(frozen=True)
class FeedForward:
    """Where the FFN of a family is: paths of modules, relative to a layer."""

    layers: str = field(metadata={"help": "Path of the list of layers, relative to the base model."})
    up: tuple[str, ...] = field(metadata={"help": "Linear layers that make the neurons: up, or gate and up."})
    down: str = field(metadata={"help": "Linear layer that reads the neurons."})
    activation: str = field(metadata={"help": "Its activation function."})
    block: str = field(metadata={"help": "What the mixture takes the place of."})
    emptied: str | None = field(default=None, metadata={"help": "What else belongs to the FFN, and lets all pass."})
    neuron_dropout: str | None = field(default=None, metadata={"help": "Dropout between activation and down."})
    output_dropout: str | None = field(default=None, metadata={"help": "Dropout after down that `block` contains."})
    models: dict[str, str] | None = field(
        default=None, metadata={"help": "Model class by auto class; None: as in the stock family."}
    )
    causal: bool = field(default=False, metadata={"help": "Whether tokens must not know of later ones."})


@use_experts_implementation
class MixtureExperts(nn.Module):
    """The FFNs of one layer as stacks (experts, ...), run by Transformers' experts interface.

    Stacks have the layout of the dense layers that they are copies of: `up_proj`, or gate above up in `gate_up_proj`,
    is (experts, neurons, hidden), `down_proj` (experts, hidden, neurons), both transposed where the dense ones were
    Conv1D; `..._bias` (experts, neurons or hidden) where these had biases.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        up: list[nn.Module],
        down: nn.Module,
        activation: nn.Module,
        dropout: nn.Module,
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.activation, self.dropout = activation, dropout
        for name, linears in (("gate_up_proj" if len(up) > 1 else "up_proj", up), ("down_proj", [down])):
            weight, bias, transposed = linears[0].weight, linears[0].bias, isinstance(linears[0], Conv1D)
            shape = list(weight.shape)
            shape[int(transposed)] *= len(linears)
            setattr(self, name, nn.Parameter(weight.new_empty(self.num_experts, *shape)))
            if bias is not None:
                setattr(self, f"{name}_bias", nn.Parameter(bias.new_zeros(self.num_experts, len(linears) * len(bias))))

    def act_fn(self, neurons: Tensor) -> Tensor:
        """What lies between up and down."""
        return self.dropout(self.activation(neurons))

    def _apply_gate(self, gate_and_up: Tensor) -> Tensor:
        """The same where there is a gate."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        return self.dropout(self.activation(gate) * up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The `eager` implementation: each expert on its tokens, one after the other, added up in float32.

        Experts without tokens run too, so that every parameter has a gradient.
        """
        name, between = ("gate_up_proj", self._apply_gate) if self.has_gate else ("up_proj", self.act_fn)
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in range(self.num_experts):
            tokens, places = torch.where(top_k_index == expert)
            neurons = between(self._linear(hidden_states[tokens], name, expert))
            made = self._linear(neurons, "down_proj", expert) * top_k_weights[tokens, places, None]
            output = output.index_add(0, tokens, made.float())
        return output.to(hidden_states.dtype)

    def _linear(self, inputs: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return nn.functional.linear(inputs, weight.T if self.is_transposed else weight, bias)


class MixtureBlock(nn.Module):
    """A mixture of experts in the place of a dense layer's FFN, whose activation and dropouts it takes over.

    By default each token goes to the experts with its `num_experts_per_tok` largest logits, weighted by a softmax over
    these alone. The weights sum to 1, so identical experts compute what one does, whatever the router (which for the
    same reason then gets no gradient from the task's loss). `RouterConfig` has the other ways. A token that no expert
    takes gets zeros here, so that it passes by the residual connection alone.

    Attributes:
        dropped_fraction: a number on the device, without padding, of the last forward pass: with 'expert_choice' the
            tokens that no expert took; else, in training with a `capacity_factor`, the choices lost to full experts.
    """

    def __init__(
        self, config: PreTrainedConfig, layer: nn.Module, table: FeedForward, router: RouterConfig, number: int
    ) -> None:
        super().__init__()
        up, down = [layer.get_submodule(path) for path in table.up], layer.get_submodule(table.down)
        transposed = isinstance(down, Conv1D)
        hidden = down.weight.shape[int(transposed)]
        self.routing = router
        if router.kind != "hash":  # whoever changes `top_k` finds none where it does nothing
            self.top_k = config.num_experts_per_tok
        self.router = _router(config, router, hidden, number).to(down.weight.device)
        self.experts = MixtureExperts(
            config, up, down, layer.get_submodule(table.activation), _dropout(layer, table.neuron_dropout)
        )
        # The decorator says these of a class; they depend on the FFN.
        self.experts.has_gate, self.experts.has_bias = len(up) > 1, down.bias is not None
        self.experts.is_transposed = transposed
        self.dropout = _dropout(layer, table.output_dropout)
        self.dropped_fraction: Tensor | None = None
        self._refuse_stock_classes(table.down.removeprefix(table.block).removeprefix("."))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.endswith("bias"):
                nn.init.normal_(parameter, std=getattr(config, "initializer_range", 0.02))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Of hidden states (..., hidden), of the same shape."""
        tokens, dtype = hidden_states.reshape(-1, hidden_states.shape[-1]), self.experts.down_proj.dtype
        if self.routing.kind == "expert_choice":
            output = self._chosen_by_experts(tokens, _counted(hidden_states), dtype)
        else:
            experts, weights = self._by_id(hidden_states) if self.routing.kind == "hash" else self._by_logits(tokens)
            if self.routing.capacity_factor is not None and self.training:
                counted, count = _counted(hidden_states).reshape(-1), self.experts.num_experts
                kept, dropped = within_capacity(experts, count, self.routing.capacity_factor, counted)
                weights, self.dropped_fraction = weights * kept, dropped
            # In float32 to the end: rounded weights would not sum to 1.
            output = self.experts(tokens.to(dtype), experts, weights)
        return self.dropout(output.reshape(hidden_states.shape))

    def _by_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(tokens)
        return experts_by_logits(logits, self.router.selection_bias, self.top_k, self.routing.norm_topk_prob)

    def _by_id(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.router(_ids(hidden_states)).reshape(-1, 1)
        return experts, torch.ones_like(experts, dtype=torch.float32)

    def _chosen_by_experts(self, tokens: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
        """Each expert runs on its tokens of every sequence; these are given to it as if each were one with one expert.

        Places that a short sequence leaves empty hold other tokens, with weight 0.
        """
        scores = self.router(tokens).softmax(dim=-1).reshape(*counted.shape, -1)
        positions, taken = tokens_by_experts(scores, self.routing.capacity_factor or self.top_k, counted)
        mask = torch.zeros_like(scores, dtype=torch.bool).transpose(1, 2).scatter(2, positions, taken).transpose(1, 2)
        weights = scores * mask
        if self.routing.norm_topk_prob:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        alone = counted & ~mask.any(dim=-1)
        self.dropped_fraction = alone.sum() / counted.sum().clamp(min=1)
        rows = torch.arange(len(counted), device=tokens.device)[:, None, None] * counted.shape[1]
        places = (positions + rows).reshape(-1)
        experts = torch.arange(scores.shape[-1], device=tokens.device)[:, None].expand_as(positions).reshape(-1, 1)
        made = self.experts(
            tokens[places].to(dtype), experts, weights.transpose(1, 2).gather(2, positions).reshape(-1, 1)
        )
        return torch.zeros_like(tokens, dtype=torch.float32).index_add(0, places, made.float()).to(dtype)

    def _refuse_stock_classes(self, path: str) -> None:
        """Let something of another shape have the dense weight's name, so that a stock class raises an error.

        Otherwise `BertModel.from_pretrained(folder)` would warn and go on with fresh FFNs.
        """
        if path:
            self.add_module(path, nn.Module())
        self.get_submodule(path).register_buffer("weight", torch.zeros(1, dtype=torch.uint8))


def _router(config: PreTrainedConfig, router: RouterConfig, hidden: int, number: int) -> nn.Module:
    experts = config.num_experts
    match router.kind:
        case "hash":
            return HashRouter(experts, config.hash_vocab_size, number)
        case "cosine":
            return CosineRouter(experts, hidden, router.size, router.bias)
    return MixtureRouter(experts, hidden, router.bias)


def _dropout(layer: nn.Module, path: str | None) -> nn.Module:
    return nn.Identity() if path is None else layer.get_submodule(path)


@dataclass(frozen=True)
class Batch:
    """What blocks must know of a forward pass and are not given: ids and mask, as the base model is given them."""

    ids: Tensor | None
    mask: Tensor | None


# Its `batch` is a `Batch` or None; of a thread, since `DataParallel` runs a model in several at once. No subclass with
# a default: torch.compile does not follow one.
_CURRENT = threading.local()


def record_batches(base: nn.Module) -> None:
    """Let blocks inside a base model know the batch while it runs."""
    names = tuple(inspect.signature(base.forward).parameters)
    base.register_forward_pre_hook(partial(_enter, names), with_kwargs=True)
    base.register_forward_hook(_leave, always_call=True)


def _enter(names: tuple[str, ...], _: nn.Module, arguments: tuple, options: dict[str, object]) -> None:
    given = {**dict(zip(names, arguments, strict=False)), **options}
    _CURRENT.batch = Batch(given.get("input_ids"), given.get("attention_mask"))


def _leave(*_: object) -> None:
    _CURRENT.batch = None


def checkpoint_with_batch(checkpoint: Callable) -> Callable:
    """A gradient checkpointing function whose recomputation knows the batch of its forward pass."""

    def checkpointed(run: Callable, *arguments: object, **options: object) -> object:
        return checkpoint(partial(_run_within, _batch(), run), *arguments, **options)

    return checkpointed


def _run_within(batch: Batch | None, run: Callable, *arguments: object, **options: object) -> object:
    before = _batch()
    _CURRENT.batch = batch
    try:
        return run(*arguments, **options)
    finally:
        _CURRENT.batch = before


def _batch() -> Batch | None:
    return getattr(_CURRENT, "batch", None)


def _required_batch() -> Batch:
    batch = _batch()
    if batch is None:
        raise ValueError(
            "The routers of this mixture must know padding or token ids, which the base model tells them: call it, or "
            "the whole model, not a part."
        )
    return batch


def _counted(hidden_states: Tensor) -> Tensor:
    """Bool (sequences, length): tokens that are not padding; without a mask all."""
    shape, mask = hidden_states.shape[:2], _required_batch().mask
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=hidden_states.device)
    # With a cache the mask is that of all tokens so far.
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != shape[0] or mask.shape[1] < shape[1]:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"The routers of this mixture must know padding by an `attention_mask` of shape {list(shape)}, got "
            f"{found}. Leave it out where there is none."
        )
    return mask[:, mask.shape[1] - shape[1] :].to(hidden_states.device) != 0


def _ids(hidden_states: Tensor) -> Tensor:
    ids = _required_batch().ids
    if ids is None or ids.numel() != hidden_states.shape[:-1].numel():
        found = "none" if ids is None else f"shape {list(ids.shape)}"
        raise ValueError(
            f"The routers of this mixture hash token ids, so the model needs `input_ids` of shape "
            f"{list(hidden_states.shape[:-1])}, got {found}: embeddings cannot be hashed."
        )
    return ids.to(hidden_states.device)
