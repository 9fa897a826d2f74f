"""What do the routers of a Transformers model compute while it trains, and which experts do they choose?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sparse_hf.algorithms.balance import Scores
from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.moe.modeling_mixture import FEED_FORWARDS, MODEL_TYPE
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.moe.router_weights import RouterWeights


# Entry for the number of experts; in all of them a block calls its `gate` or `router`, then its `experts` with hidden
# states, chosen experts and weights.
EXPERT_COUNTS = {
    **{model_type: target.count for model_type, target in TARGETS.items()},
    **{f"{MODEL_TYPE}{family}": "num_experts" for family in FEED_FORWARDS},
    "olmoe": "num_experts",
    "phimoe": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}
SIGMOID_ROUTED = ("glm4_moe", "dots1", "lfm2_moe", "deepseek_v3")  # all others by a softmax; Cohere2's config says
ROUTER_NAMES = ("gate", "router")
# Kinds of routers of our own mixtures.
UNREAD = {"expert_choice": "each expert takes equally many tokens", "hash": "a table decides, and nothing is trained"}


@dataclass(frozen=True)
class Routing:
    """What one layer's router did in one forward pass, padding included.

    Attributes:
        inputs: (tokens, hidden), detached.
        logits: (tokens, experts), with the graph of the pass.
        chosen: integer (tokens, top_k).
    """

    inputs: Tensor
    logits: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class RouterLayer:
    """Where a layer's router and experts are; `name` is that of their block."""

    name: str
    router: nn.Module
    experts: nn.Module


class RouterReader:
    """Reads the routers of a model by hooks, which only take references: nothing is computed in the model's passes.

    That is what makes it right under gradient checkpointing: logits come from the forward pass, whose graph recomputes
    what it needs by itself (`use_reentrant=False`, the default; with True logits have no graph), and the recomputation
    runs in the backward pass, when nobody listens, so that no token counts twice.

    Attributes:
        names: of the blocks, in model order.
        experts: number of experts.
        scores: whether experts are chosen by a softmax or by sigmoids.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: not a family that can be read, or all its layers are dense.
        """
        config = model.config
        if config.model_type not in EXPERT_COUNTS:
            raise ValueError(
                f"Routers can be read of {', '.join(EXPERT_COUNTS)}, got a model of type {config.model_type!r}: it is "
                "dense, or its routers are not known."
            )
        kind = getattr(config, "router", "top_k") if config.model_type.startswith(MODEL_TYPE) else "top_k"
        if kind in UNREAD:
            raise ValueError(
                f"Routers of kind {kind!r} have no choice by logits that could be read or balanced: {UNREAD[kind]}. "
                "Leave `balance` out."
            )
        self.model_type = config.model_type
        self.experts = getattr(config, EXPERT_COUNTS[config.model_type])
        self.scores = _scores(config)
        self._layers = _router_layers(model)
        if not self._layers:
            raise ValueError(f"No routers were found in this {config.model_type} model: all its layers are dense.")
        _require_float(self._layers)
        self.names = tuple(layer.name for layer in self._layers)
        self._calls: dict[str, list[tuple]] | None = None  # None: nobody listens
        self._hooks = [hook for layer in self._layers for hook in self._watch(layer)]

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @property
    def routers(self) -> list[nn.Module]:
        """The layers' routers, in order of `names`."""
        return [layer.router for layer in self._layers]

    @contextmanager
    def listening(self) -> Iterator[list[Routing]]:
        """Inside, the model runs forward once; afterwards the list holds the layers' routings, in order of `names`.

        Raises:
            ValueError: a router or its experts were not called exactly once, or in another way than known. What
                cannot be read is never left out.
        """
        self._calls = {f"{kind} {name}": [] for name in self.names for kind in ("router", "experts")}
        found: list[Routing] = []
        try:
            yield found
            found += [self._routing(name) for name in self.names]
        finally:
            self._calls = None

    def linear_routers(self) -> list[tuple[nn.Parameter, nn.Parameter | None] | None]:
        """Of each layer the trained weight (experts, hidden) of its router and the bias, if any; None: it is frozen.

        Raises:
            ValueError: something else in a router is trained too, LoRA for instance.
        """
        return [self._linear_router(layer) for layer in self._layers]

    def router_weights(self) -> RouterWeights:
        """The trained weights and biases of `linear_routers`, to be held where ranks have parts of them."""
        return RouterWeights(self.routers, [partial(self._linear_router, layer) for layer in self._layers])

    def _linear_router(self, layer: RouterLayer) -> tuple[nn.Parameter, nn.Parameter | None] | None:
        # Ernie's bias for the choice is a parameter too, but the choice has no gradient.
        trained = {
            name: one
            for name, one in layer.router.named_parameters()
            if one.requires_grad and not name.endswith("e_score_correction_bias")
        }
        if not trained:
            return None
        shapes = {name: whole_shape(one) for name, one in trained.items()}
        weights = [trained[name] for name, shape in shapes.items() if len(shape) == 2 and shape[0] == self.experts]
        biases = [trained[name] for name, shape in shapes.items() if tuple(shape) == (self.experts,)]
        if len(weights) != 1 or len(biases) > 1 or len(weights) + len(biases) != len(trained):
            raise ValueError(
                f"A router must train one weight of {self.experts} rows and nothing but a bias beside it, but in "
                f"`{layer.name}` {', '.join(trained)} are trained. Cosine routers need "
                '`BalanceConfig(gradient="network")`; routers that PEFT wraps this or `modules_to_save`.'
            )
        return weights[0], biases[0] if biases else None

    def _watch(self, layer: RouterLayer) -> Iterator[object]:
        def routed(_: nn.Module, arguments: tuple, output: object) -> None:
            if self._calls is not None:
                self._calls[f"router {layer.name}"].append((arguments, output))

        def called(_: nn.Module, arguments: tuple) -> None:
            if self._calls is not None:
                self._calls[f"experts {layer.name}"].append(arguments)

        yield layer.router.register_forward_hook(routed)
        yield layer.experts.register_forward_pre_hook(called)

    def _routing(self, name: str) -> Routing:
        routed, called = self._calls[f"router {name}"], self._calls[f"experts {name}"]
        if len(routed) != 1 or len(called) != 1:
            raise ValueError(
                f"The router and the experts of `{name}` must be called once in a forward pass, got {len(routed)} and "
                f"{len(called)} calls: the model runs twice for one loss, or its block is replaced by a kernel."
            )
        (arguments, output), passed = routed[0], called[0]
        outputs = output if isinstance(output, tuple) else (output,)
        chosen, weights = passed[1:] if len(passed) == 3 else (None, None)
        # Their place differs between families and releases (Granite's between 5.17 and 5.23). Where all experts are
        # chosen the weights, which go to the experts too, have the same shape.
        logits = [one for one in outputs if self._is_logits(one) and one is not weights]
        fits = (
            len(logits) == 1
            and isinstance(chosen, Tensor)
            and chosen.dtype in (torch.int32, torch.int64)
            and chosen.ndim == 2
            and len(chosen) == len(logits[0])
        )
        if not fits:
            raise ValueError(
                f"The router of `{name}` must return logits for {self.experts} experts, and the experts take what is "
                f"chosen by them, but this {self.model_type} model does not: this release of Transformers runs it in "
                "another way."
            )
        inputs = arguments[0].detach()
        return Routing(inputs.reshape(-1, inputs.shape[-1]), logits[0], chosen)

    def _is_logits(self, output: object) -> bool:
        return (
            isinstance(output, Tensor)
            and output.is_floating_point()
            and output.ndim == 2
            and output.shape[1] == self.experts
        )


def layer_number(name: str) -> int:
    """The number of the layer that the block `name` is in, such as 3 of `model.layers.3.mlp`."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def check_linear(routing: Routing, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Raise ValueError unless the logits are, up to rounding, `weight` times the inputs (plus the bias)."""
    with torch.no_grad():
        expected = nn.functional.linear(
            routing.inputs.float(), weight.float(), None if bias is None else bias.float()
        ).to(routing.logits.device)
        largest = expected.abs().amax()
        # bfloat16 has 8 bits; what this is to find is off by far more.
        wrong = bool((expected - routing.logits.float()).abs().amax() > 0.05 * largest + 1e-6)
    if wrong:
        raise ValueError(
            f"The logits of `{name}` must be its trained weight times its input, but they are not: something else "
            'takes part in routing. Use `BalanceConfig(gradient="network")`.'
        )


def _scores(config: PreTrainedConfig) -> Scores:
    sigmoid = config.model_type in SIGMOID_ROUTED or getattr(config, "expert_selection_fn", "softmax") == "sigmoid"
    return "sigmoid" if sigmoid else "softmax"


def _require_float(layers: list[RouterLayer]) -> None:
    """Raise ValueError if a router was quantised; experts may be."""
    for layer in layers:
        buffers = [found for found in layer.router.named_buffers() if "weight" in found[0]]  # GPTQ's and AWQ's
        for name, one in (*layer.router.named_parameters(), *buffers):
            if one.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"Routers must have floating-point weights, but `{name}` in the router of `{layer.name}` is "
                    f"{one.dtype}. Leave routers out of the quantisation (`llm_int8_skip_modules`, "
                    "`modules_to_not_convert`)."
                )


def _router_layers(model: nn.Module) -> list[RouterLayer]:
    found = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        routers = [children[one] for one in ROUTER_NAMES if one in children]
        if "experts" in children and len(routers) == 1:
            found.append(RouterLayer(name, routers[0], children["experts"]))
    return found
