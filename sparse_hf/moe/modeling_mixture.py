"""Stock Transformers models, some of whose FFNs are mixtures of experts: for families without such a sibling.

This file is self-contained: it is copied beside the weights of a mixture, so that
`AutoModel....from_pretrained(folder, trust_remote_code=True)` works where sparse_hf is not installed. It needs torch
and transformers only.

`MixtureBertForSequenceClassification` and its like are made on demand from the stock class: built by the stock code,
then the FFNs of `config.mixture_layers` give way to a `MixtureBlock` before weights are loaded. Layer norms, residuals
and dropout stay where they are. No weight of the base model is ever fresh after loading, and stock classes refuse the
weights. `config.num_experts` and `config.num_experts_per_tok` say the rest.
"""

import inspect
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import maybe_autocast


MODEL_TYPE = "sparse_hf_mixture_"  # before the stock model's


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


# BertOutput stays, with its dropout, residual and layer norm; only its first linear layer becomes the mixture.
_BERT_LIKE = FeedForward(
    layers="encoder.layer",
    up=("intermediate.dense",),
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    block="output.dense",
    emptied="intermediate",
)


def _t5(*up: str) -> FeedForward:
    ffn = "layer.1.DenseReluDense"
    return FeedForward(
        layers="encoder.block",
        up=tuple(f"{ffn}.{name}" for name in up),
        down=f"{ffn}.wo",
        activation=f"{ffn}.act",
        block=ffn,
        neuron_dropout=f"{ffn}.dropout",
        # Encoders only: the stock family's other models have a decoder.
        models={
            "AutoModel": "T5EncoderModel",
            "AutoModelForTextEncoding": "T5EncoderModel",
            "AutoModelForTokenClassification": "T5ForTokenClassification",
        },
    )


# The variants of each family by the stock `model_type`; the one whose paths all exist in the model is taken.
FEED_FORWARDS: dict[str, tuple[FeedForward, ...]] = {
    "bert": (_BERT_LIKE,),
    "roberta": (_BERT_LIKE,),
    "gpt2": (FeedForward("h", ("mlp.c_fc",), "mlp.c_proj", "mlp.act", "mlp", output_dropout="mlp.dropout"),),
    "vit": (FeedForward("layers", ("mlp.fc1",), "mlp.fc2", "mlp.activation_fn", "mlp"),),
    "t5": (_t5("wi"), _t5("wi_0", "wi_1")),
}


class MixtureRouter(nn.Module):
    """One logit per token and expert, computed in float32 whatever the model's dtype.

    A hook point: what `register_forward_hook` sees as output are the logits, (tokens, experts), for a balance loss or
    statistics. Tokens are those of the whole batch, flattened, padding included.
    """

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (tokens, experts) of hidden states (tokens, hidden)."""
        with maybe_autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.float(), self.weight.float())


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

    Each token goes to the experts with its `num_experts_per_tok` largest logits, weighted by a softmax over these
    alone. The weights sum to 1, so identical experts compute what one does, whatever the router (which for the same
    reason then gets no gradient from the task's loss).
    """

    def __init__(self, config: PreTrainedConfig, layer: nn.Module, table: FeedForward) -> None:
        super().__init__()
        up, down = [layer.get_submodule(path) for path in table.up], layer.get_submodule(table.down)
        transposed = isinstance(down, Conv1D)
        hidden = down.weight.shape[int(transposed)]
        self.top_k = config.num_experts_per_tok
        self.router = MixtureRouter(config.num_experts, hidden).to(down.weight.device)
        self.experts = MixtureExperts(
            config, up, down, layer.get_submodule(table.activation), _dropout(layer, table.neuron_dropout)
        )
        # The decorator says these of a class; they depend on the FFN.
        self.experts.has_gate, self.experts.has_bias = len(up) > 1, down.bias is not None
        self.experts.is_transposed = transposed
        self.dropout = _dropout(layer, table.output_dropout)
        self._refuse_stock_classes(table.down.removeprefix(table.block).removeprefix("."))
        for name, parameter in self.named_parameters():
            if not name.endswith("bias"):
                nn.init.normal_(parameter, std=getattr(config, "initializer_range", 0.02))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Of hidden states (..., hidden), of the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen, experts = self.router(tokens).topk(self.top_k, dim=-1)
        # In float32 to the end: rounded weights would not sum to 1.
        output = self.experts(tokens.to(self.experts.down_proj.dtype), experts, chosen.softmax(dim=-1))
        return self.dropout(output.reshape(hidden_states.shape))

    def _refuse_stock_classes(self, path: str) -> None:
        """Let something of another shape have the dense weight's name, so that a stock class raises an error.

        Otherwise `BertModel.from_pretrained(folder)` would warn and go on with fresh FFNs.
        """
        if path:
            self.add_module(path, nn.Module())
        self.get_submodule(path).register_buffer("weight", torch.zeros(1, dtype=torch.uint8))


def _dropout(layer: nn.Module, path: str | None) -> nn.Module:
    return nn.Identity() if path is None else layer.get_submodule(path)


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The base model inside `model` and the beginning of its parameters' names (`"bert."`, or nothing)."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def _put_mixtures(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    tables = FEED_FORWARDS[config.model_type.removeprefix(MODEL_TYPE)]
    layers = base_of(model)[1].get_submodule(tables[0].layers)
    _check_config(config, len(layers))
    for layer in (layers[number] for number in config.mixture_layers):
        there = {name for name, _ in layer.named_modules()}
        table = next(one for one in tables if {*one.up, one.down} <= there)
        block = MixtureBlock(config, layer, table)
        if table.emptied is not None:
            layer.set_submodule(table.emptied, nn.Identity())
        layer.set_submodule(table.block, block)


def _check_config(config: PreTrainedConfig, layers: int) -> None:
    experts, top_k, chosen = (
        getattr(config, name, None) for name in ("num_experts", "num_experts_per_tok", "mixture_layers")
    )
    counts = type(experts) is int and type(top_k) is int and 1 <= top_k <= experts
    numbers = isinstance(chosen, list) and all(type(one) is int and 0 <= one < layers for one in chosen)
    if not counts or not numbers or len(set(chosen)) < len(chosen):
        raise ValueError(
            "The config of a mixture must have `num_experts`, between 1 and as many `num_experts_per_tok`, and a list "
            f"`mixture_layers` of layers from 0 to {layers - 1}, got {experts!r}, {top_k!r} and {chosen!r:.200}. "
            "Correct it."
        )


def mixture_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class of mixtures of a stock `model_type`: `sparse_hf_mixture_bert` for `bert`."""
    base = CONFIG_MAPPING[model_type]
    name = f"Mixture{base.__name__}"
    if name in globals():
        return globals()[name]

    def __post_init__(self: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        base.__post_init__(self, *args, **kwargs)
        _register_models(type(self), model_type)

    members = {
        "__post_init__": __post_init__,
        "__module__": __name__,
        "__doc__": f"A {base.__name__} with `num_experts`, `num_experts_per_tok` and `mixture_layers`.",
        "model_type": f"{MODEL_TYPE}{model_type}",
        "_auto_class": "AutoConfig",
    }
    globals()[name] = type(name, (base,), members)
    return globals()[name]


def _register_models(config_class: type[PreTrainedConfig], model_type: str) -> None:
    """Let the auto classes know the models of a config: when one is read, so that no other family is imported."""
    for auto, stock in stock_models(model_type).items():
        getattr(transformers, auto).register(config_class, mixture_model_class(stock), exist_ok=True)


def mixture_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of mixtures of a stock model class."""
    name = f"Mixture{base.__name__}"
    if name in globals() and globals()[name].__bases__ == (base,):  # a user's class may be called like a stock one
        return globals()[name]
    model_type = base.config_class.model_type

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        requested = config._experts_implementation
        config._experts_implementation = "eager"  # stock modules, which share the config, accept no other
        base.__init__(self, config, *args, **kwargs)
        _put_mixtures(self, config)
        config._experts_implementation = self.get_correct_experts_implementation(requested)

    def from_pretrained(
        cls: type[PreTrainedModel], *args: object, output_loading_info: bool = False, **kwargs: object
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
        """The stock method, but what the checkpoint does not fill of the base model is an error, not fresh weights."""
        model, info = super(made, cls).from_pretrained(*args, output_loading_info=True, **kwargs)
        _require_filled(model, info)
        return (model, info) if output_loading_info else model

    kept = list(base._keep_in_fp32_modules or ())
    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"A {base.__name__} with mixtures of experts in the layers that its config names.",
        "__signature__": inspect.signature(base.__init__),
        "config_class": mixture_config_class(model_type),
        "from_pretrained": classmethod(from_pretrained),
        # T5's `wo` overflows in float16 and is kept from it; here that is all of an expert.
        "_keep_in_fp32_modules": [*kept, "experts"] if kept else None,
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or ()), "router"],
        # Both are guessed from the source text of the class's file, which is this one.
        "_can_set_attn_implementation": classmethod(lambda cls: base._can_set_attn_implementation()),
        "_can_set_experts_implementation": classmethod(lambda cls: True),
        "_auto_class": next((auto for auto, stock in stock_models(model_type).items() if stock is base), "AutoModel"),
    }
    made = globals()[name] = type(name, (base,), members)
    # Checkpoints of some families (ViT) have other names than the modules, by a list kept under the class's name.
    if (renaming := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renaming, overwrite=True)
    return made


def _require_filled(model: PreTrainedModel, info: dict) -> None:
    """Raise ValueError if weights of the base model are fresh; a head is new under another task, a pooler may be."""
    prefix = base_of(model)[0]
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    fresh = sorted(name for name in missing if name.startswith(prefix) and not name.startswith(f"{prefix}pooler."))
    if fresh:
        raise ValueError(
            "The checkpoint must hold every weight of the base model in the size that its config tells, but "
            f"`{fresh[0]}` ({len(fresh)} in all) is missing or has another shape. It or its config is damaged."
        )


def stock_models(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The stock model class behind the name of every auto class that serves mixtures of `model_type`."""
    named = FEED_FORWARDS[model_type][0].models
    if named is not None:
        return {auto: getattr(transformers, stock) for auto, stock in named.items()}
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    mappings = {name: getattr(auto, "_model_mapping", None) for name, auto in autos.items()}
    found = {name: one._model_mapping.get(model_type) for name, one in mappings.items() if one is not None}
    names = {name: stock if isinstance(stock, str) else stock[0] for name, stock in found.items() if stock}
    return {name: getattr(transformers, stock) for name, stock in names.items()}


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix("Mixture"), None) if name.startswith("Mixture") else None
    known = inspect.isclass(stock) and issubclass(stock, (PreTrainedConfig, PreTrainedModel))
    model_type = getattr(getattr(stock, "config_class", stock), "model_type", None) if known else None
    if model_type not in FEED_FORWARDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return mixture_config_class(model_type) if issubclass(stock, PreTrainedConfig) else mixture_model_class(stock)
