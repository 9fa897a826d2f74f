"""How do experts that are stored once stay so, whatever is done to the model? What cannot be done is refused."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel


def is_shared(tensor: Tensor) -> bool:
    """Whether the first axis has several places and one storage."""
    return tensor.ndim > 1 and tensor.shape[0] > 1 and tensor.stride(0) == 0


def keep_shared(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Guard the shared parameters of the named modules.

    `.to()` and its like move the one matrix, DDP leaves it alone, and `save_pretrained` as well as a forward pass that
    would give it a gradient raise a ValueError. The model's class stays the stock one.
    """
    for name in modules:
        experts = model.get_submodule(name)
        experts._apply = functools.partial(_apply_to_one, experts)
        experts.register_forward_pre_hook(_require_frozen)
    model._ddp_params_and_buffers_to_ignore = list(_names_in_wrappers(model))
    model.save_pretrained = functools.partial(_save_pretrained, model)


def _names_in_wrappers(model: PreTrainedModel) -> Iterator[str]:
    """What DDP must leave alone: at its start it writes rank 0's numbers into every parameter, which torch refuses.

    PEFT's model passes the attribute on, but names the parameters by its own levels.
    """
    for name, parameter in model.named_parameters():
        if is_shared(parameter):
            module, _, last = name.rpartition(".")
            yield name
            yield from (
                f"base_model.model.{module}{levels}.{last}" for levels in ("", ".base_layer", 2 * ".base_layer")
            )


def _apply_to_one(experts: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which would make a copy per expert, with one for all of them."""
    every = dict(experts._parameters)
    shared = {name: parameter for name, parameter in every.items() if is_shared(parameter)}
    for parameter in shared.values():
        parameter.data = fn(parameter.data[:1]).expand_as(parameter)
    experts._parameters = {name: one for name, one in every.items() if name not in shared}
    try:
        type(experts)._apply(experts, fn, recurse)
    finally:
        experts._parameters = {name: experts._parameters.get(name, one) for name, one in every.items()}
    return experts


def _require_frozen(experts: nn.Module, _: tuple) -> None:
    wrong = [name for name, one in _own(experts).items() if one.requires_grad and is_shared(one)]
    if wrong:
        raise ValueError(
            f"Shared experts must stay frozen, but `{wrong[0]}` requires a gradient: a step would change all experts "
            "at once. Train an adapter (`expert_lora_targets`), or write the mixture with `upcycle`."
        )


def _own(experts: nn.Module) -> Mapping[str, Tensor]:
    """The stored parameters, also while PEFT computes others from them."""
    computed = getattr(experts, "parametrizations", {})
    return {**experts._parameters, **{name: computed[name].original for name in computed}}


def _save_pretrained(model: PreTrainedModel, *args: object, **options: object) -> None:
    """`PreTrainedModel.save_pretrained` where experts are no longer shared, as after a merge into real copies."""
    if any(is_shared(parameter) for parameter in model.parameters()):
        raise ValueError(
            "A model with shared experts is not saved as it is: its file would hold a copy per expert. Save the "
            "adapter (PEFT's `save_pretrained`) and write the trained mixture with `export_merged`, or write the "
            "untrained one with `upcycle`."
        )
    type(model).save_pretrained(model, *args, **options)
