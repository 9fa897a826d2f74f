"""Routers that compute in float32 while the model around them computes in less."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Float32Routers:
    """Hooks by which routers compute in float32, under autocast and with weights in half precision, until `detach`.

    Weights stay what they are: the router sees a float32 copy of them and of its input, and the gradient flows back
    through both. So checkpoints and the optimizer know nothing of it. What routers return is float32 unless they
    themselves make it something else; every family's experts take their weights so.
    """

    def __init__(self, routers: Iterable[nn.Module]) -> None:
        self._open: dict[nn.Module, tuple[torch.autocast, list[tuple[dict, str, nn.Parameter]]]] = {}
        self._hooks = []
        for router in routers:
            # Innermost, since ZeRO-3's hooks bring weights before and put them away afterwards.
            self._hooks.append(router.register_forward_pre_hook(self._begin))
            # Also when the router fails, so that its weights always come back.
            self._hooks.append(router.register_forward_hook(self._end, prepend=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, router: nn.Module, arguments: tuple) -> tuple:
        owned = [
            (module._parameters, name, one)
            for module in router.modules()
            for name, one in module._parameters.items()
            if one is not None and one.is_floating_point() and one.dtype != torch.float32
        ]
        for parameters, name, one in owned:
            parameters[name] = one.float()
        autocast = torch.autocast(arguments[0].device.type, enabled=False)
        autocast.__enter__()
        self._open[router] = autocast, owned
        return tuple(_float32(one) for one in arguments)

    def _end(self, router: nn.Module, arguments: tuple, output: object) -> None:
        if router in self._open:
            autocast, owned = self._open.pop(router)
            autocast.__exit__(None, None, None)
            for parameters, name, one in owned:
                parameters[name] = one


def _float32(argument: object) -> object:
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
