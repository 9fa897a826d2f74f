"""Gradients for the routers' weights where ranks hold parts of them.

FSDP2 and ZeRO-3 have a weight whole only while its module runs, and take its gradient from the graph of that pass: a
tensor added afterwards would be added to a part, or to nothing. So the graph gets a place for it during the pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


Linear = tuple[Tensor, Tensor | None]  # a weight and its bias, if any, or their gradients


@dataclass
class Place:
    """Where a router's weight was used in one pass.

    Attributes:
        zero: a scalar 0 in the graph of the pass, whose gradient by the weight and the bias is `gradients`.
        gradients: to be set before the backward pass.
        copies: of weight and bias as they were used, where asked for.
    """

    zero: Tensor | None = None
    gradients: Linear | None = None
    copies: Linear | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Place":
        """Where weight and bias are now, whole."""
        place = cls()
        place.zero = _Entrance.apply(place, weight, bias)
        return place


class _Entrance(torch.autograd.Function):
    """Zero, whose gradients by the weights are those of `place`."""

    @staticmethod
    def forward(ctx: FunctionCtx, place: Place, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.place = place
        return weight.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if one is None else scale * one for one in ctx.place.gradients)


class RouterWeights:
    """Takes hold of routers' weights where their modules run."""

    def __init__(self, routers: Sequence[nn.Module], trained_of: Sequence[Callable[[], Linear | None]]) -> None:
        """
        Args:
            trained_of: of each router, what finds its trained weight and bias as they are at that moment.
        """
        self._places: list[Place | None] | None = None  # None: nobody holds
        self._copying = False
        self._hooks = []
        for layer, (router, trained) in enumerate(zip(routers, trained_of, strict=True)):
            found = trained()
            if found is not None:
                hook = self._hold_of(layer, trained)
                self._hooks.append(_owner(router, found[0]).register_forward_pre_hook(hook))
        self._count = len(routers)

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def holding(self, copying: bool) -> Iterator[list[Place | None]]:
        """Inside, the model runs forward once; the list has a place per router, None where it is frozen.

        Args:
            copying: weights are copied, for a look at them after the pass.
        """
        self._places, self._copying = [None] * self._count, copying
        try:
            yield self._places
        finally:
            self._places = None

    def _hold_of(self, layer: int, trained: Callable[[], Linear | None]) -> Callable[[nn.Module, tuple], None]:
        def hold(*_: object) -> None:
            if self._places is None:
                return
            weight, bias = trained()
            place = self._places[layer] = Place.of(weight, bias) if torch.is_grad_enabled() else Place()
            if self._copying:
                place.copies = weight.detach().clone(), None if bias is None else bias.detach().clone()

        return hold


def zero_with(places: Sequence[Place | None], gradients: Sequence[Linear | None]) -> Tensor:
    """Zero, whose gradients by the routers' weights are those given.

    Raises:
        ValueError: a pass had no graph, as that of reentrant gradient checkpointing.
    """
    found = []
    for place, one in zip(places, gradients, strict=True):
        if one is None:
            continue
        if place is None or place.zero is None:
            raise ValueError(
                "The graph of the last forward pass must hold the routers' weights where ranks have parts of them, "
                "but it does not: gradient checkpointing must run with `use_reentrant=False`."
            )
        place.gradients = one
        found.append(place.zero)
    return torch.stack(found).sum()


def _owner(router: nn.Module, weight: Tensor) -> nn.Module:
    """The module whose own parameter `weight` is: PEFT's `modules_to_save` puts one around it."""
    return next(one for one in router.modules() if any(weight is held for held in one.parameters(recurse=False)))
