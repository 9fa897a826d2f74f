"""What is run to measure a model's latency: a cut layer or a whole model, forward, or forward and backward."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_hf.anatomy.modeling_slim import UnitTable, base_of, shrink
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units


SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@contextmanager
def untouched(model: nn.Module, device: torch.device, what: str) -> Iterator[None]:
    """In the mode of `what` and without a cache of keys and values; afterwards everything is as before."""
    modes = {module: module.training for module in model.modules()}
    config, cache = model.config, getattr(model.config, "use_cache", None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.train(what == "training")
            if cache is not None:
                config.use_cache = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            if cache is not None:
                config.use_cache = cache


def random_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Seeded pixels, or tokens none of which is special but the end that encoder-decoder models pool at."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(batch, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    special = set()
    for name in SPECIAL_TOKENS:
        tokens = getattr(config, name, None)
        special.update(tokens if isinstance(tokens, list) else [tokens])
    words = torch.tensor([number for number in range(config.vocab_size) if number not in special])
    inputs = {"input_ids": words[torch.randint(len(words), (batch, length), generator=generator)]}
    if config.is_encoder_decoder and config.eos_token_id is not None:
        inputs["input_ids"][:, -1] = config.eos_token_id
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = words[torch.randint(len(words), (batch, length), generator=generator)]
    return inputs


def layer_inputs(model: nn.Module, table: UnitTable, inputs: Mapping[str, Tensor]) -> tuple[tuple, dict]:
    """What the first layer is called with, the hidden states first."""
    seen: list[tuple[tuple, dict]] = []
    layer = base_of(model)[1].get_submodule(f"{table.layers}.0")
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, dict(kwargs))), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    torch.clear_autocast_cache()
    args, kwargs = seen[0]
    return args or (kwargs.pop("hidden_states"),), kwargs


def cut_layer(model: nn.Module, table: UnitTable, counts: Mapping[str, int]) -> nn.Module:
    """A copy of the first layer with its first units."""
    layer = copy.deepcopy(base_of(model)[1].get_submodule(f"{table.layers}.0"))
    holder: nn.Module = nn.ModuleList([layer])
    for name in reversed(table.layers.split(".")):
        inner, holder = holder, nn.Module()
        holder.add_module(name, inner)
    holder.config = model.config
    shrink(holder, table, {key: torch.arange(count) for key, count in counts.items()})
    return layer


def cut_model(model: nn.Module, table: UnitTable, neurons: int) -> nn.Module:
    """The model with one head and `neurons` neurons per layer, in the same mode, checkpointing activations alike."""
    kept = {
        one.key: torch.arange(one.count) < (1 if one.kind == "heads" else neurons) for one in find_units(model, table)
    }
    smaller = cut_units(model, kept, table)
    parts = dict(model.named_modules())
    for name, part in smaller.named_modules():
        # Some versions of Transformers can be asked for this, and others only deprecate it, so it is copied.
        for attribute in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in parts and attribute in vars(parts[name]):
                setattr(part, attribute, getattr(parts[name], attribute))
    return smaller


def step_of(module: nn.Module, args: tuple, kwargs: Mapping[str, object], what: str) -> Callable[[], None]:
    """A forward, and for training the backward to all parameters and to the hidden states that come in."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hidden = [args[0].detach().requires_grad_(what == "training")] if args else []

    def step() -> None:
        with torch.set_grad_enabled(what == "training"):
            output = module(*hidden, *args[1:], **kwargs)
            if what == "training":
                first = output if isinstance(output, Tensor) else output[0]
                # Not `backward`: it would add to the user's gradients and run what waits for them.
                torch.autograd.grad(first.float().sum(), [*hidden, *parameters], allow_unused=True)
        torch.clear_autocast_cache()  # every step casts the weights once

    return step
