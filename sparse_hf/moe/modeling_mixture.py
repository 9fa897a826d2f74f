"""Stock Transformers models, some of whose FFNs are mixtures of experts: for families without such a sibling.

This file, `mixture_block.py` and `mixture_routers.py` are copied beside the weights of a mixture, so that
`AutoModel....from_pretrained(folder, trust_remote_code=True)` works where sparse_hf is not installed. They import each
other relatively, and nothing else but torch and transformers.

`MixtureBertForSequenceClassification` and its like are made on demand from the stock class: built by the stock code,
then the FFNs of `config.mixture_layers` give way to a `MixtureBlock` before weights are loaded. Layer norms, residuals
and dropout stay where they are. No weight of the base model is ever fresh after loading, and stock classes refuse the
weights. `config.num_experts`, `config.num_experts_per_tok` and the entries of a `RouterConfig` say the rest.
"""

import inspect
from collections.abc import Callable

import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from .mixture_block import FeedForward, MixtureBlock, checkpoint_with_batch, record_batches
from .mixture_routers import RouterConfig, router_of


MODEL_TYPE = "sparse_hf_mixture_"  # before the stock model's
# Of routers; a hash's table, which is whole numbers, would become float32 too if it were "router".
FLOAT32 = ("router.weight", "router.projection", "router.log_temperature", "router.selection_bias")


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
    "gpt2": (
        FeedForward("h", ("mlp.c_fc",), "mlp.c_proj", "mlp.act", "mlp", output_dropout="mlp.dropout", causal=True),
    ),
    "vit": (FeedForward("layers", ("mlp.fc1",), "mlp.fc2", "mlp.activation_fn", "mlp"),),
    "t5": (_t5("wi"), _t5("wi_0", "wi_1")),
}


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The base model inside `model` and the beginning of its parameters' names (`"bert."`, or nothing)."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def _put_mixtures(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    tables, base = FEED_FORWARDS[config.model_type.removeprefix(MODEL_TYPE)], base_of(model)[1]
    layers = base.get_submodule(tables[0].layers)
    _check_config(config, len(layers))
    router = router_of_mixture(config)
    if router.kind == "hash":  # ids may be added to the vocabulary, not to the table
        config.hash_vocab_size = getattr(config, "hash_vocab_size", config.vocab_size)
    if router.reads_batch:
        record_batches(base)
    for number in config.mixture_layers:
        layer = layers[number]
        there = {name for name, _ in layer.named_modules()}
        table = next(one for one in tables if {*one.up, one.down} <= there)
        block = MixtureBlock(config, layer, table, router, number)
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


def router_of_mixture(config: PreTrainedConfig) -> RouterConfig:
    """What a mixture's config says about its routers.

    Raises:
        ValueError: it makes no sense, or a model of this family cannot be routed like that.
    """
    return router_of(config, FEED_FORWARDS[config.model_type.removeprefix(MODEL_TYPE)][0].causal)


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

    def _set_gradient_checkpointing(
        self: PreTrainedModel,
        enable: bool = True,
        gradient_checkpointing_func: Callable = checkpoint,
        **options: object,
    ) -> None:
        remembering = checkpoint_with_batch(gradient_checkpointing_func)
        base._set_gradient_checkpointing(self, enable, remembering, **options)

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
        "_set_gradient_checkpointing": _set_gradient_checkpointing,
        "from_pretrained": classmethod(from_pretrained),
        # T5's `wo` overflows in float16 and is kept from it; here that is all of an expert.
        "_keep_in_fp32_modules": [*kept, "experts"] if kept else None,
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or ()), *FLOAT32],
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
