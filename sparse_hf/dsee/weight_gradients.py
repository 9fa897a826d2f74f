"""What would the frozen weights' gradients be, where a support may go?"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.sparse_update import Pattern, gradient_at, make_pattern
from sparse_hf.algorithms.supports import largest_support
from sparse_hf.dsee.layer import DseeLayer
from sparse_hf.dsee.masks import adapted_layers


@contextlib.contextmanager
def watched(layers: Mapping[str, DseeLayer], visit: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `visit(name, inputs (T, in), output gradients (T, out))` in every backward pass through a layer."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """For the forward pass of a layer; sets another one for the gradient of its output."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:  # not so in the first pass of gradient checkpointing
                x = inputs[0].detach()
                output.register_hook(
                    lambda gradient: visit(
                        name, x.reshape(-1, x.shape[-1]), gradient.detach().reshape(-1, gradient.shape[-1])
                    )
                )

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class CandidateGradients:
    """The gradients of some frozen weights of every layer, summed over the backward passes of a step."""

    def __init__(self, layers: Mapping[str, DseeLayer], candidates: Mapping[str, Tensor]) -> None:
        """
        Args:
            candidates: per layer, sorted flat indices into its weight.
        """
        self._layers = layers
        self._patterns: dict[str, Pattern] = {
            name: make_pattern(places.to(layers[name].weight.device), layers[name].weight_shape)
            for name, places in candidates.items()
        }
        self.sums = {name: torch.zeros(len(places)) for name, places in candidates.items()}
        self._unseen = set(candidates)
        self._watching = contextlib.ExitStack()

    def start(self) -> None:
        """Sum from now on."""
        self._watching.enter_context(watched(self._layers, self._add))

    def stop(self) -> dict[str, Tensor]:
        """float32 sums per layer, over all processes where there are several.

        Raises:
            RuntimeError: no gradient came through some layer, as when a compiled model does not know of the hooks.
        """
        self._watching.close()
        if self._unseen:
            raise RuntimeError(
                f"No gradient was seen at `{min(self._unseen)}`: train without `torch.compile`, and with the layer in "
                "use, for a support to move."
            )
        _sum_over_processes(self.sums)
        return self.sums

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        found = gradient_at(self._patterns[name], x, gradient, input_first=self._layers[name].input_first)
        self.sums[name] = self.sums[name].to(found.device) + found.float()
        self._unseen.discard(name)


def _sum_over_processes(sums: Mapping[str, Tensor]) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for one in sums.values():
            torch.distributed.all_reduce(one)


def support_by_gradient(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], adapter_name: str = "default"
) -> None:
    """Move S2 to the weights with the largest gradient of the loss, before training.

    One dense float32 gradient per tuned matrix is held while this runs, as much memory as the tuned weights.

    Args:
        model: a `PeftModel` whose adapter was not trained yet.
        batches: with labels, on the model's device; the absolute value of their summed gradient ranks.

    Raises:
        ValueError: no adapter with S2, trained values, or no batches.
    """
    layers = adapted_layers(model, adapter_name)
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.sparse_hf_dsee_values}
    if not layers:
        raise ValueError(f"The model has no DSEE adapter `{adapter_name}` with `nnz` above 0.")
    if any(bool(layer.sparse_hf_dsee_values[adapter_name].any()) for layer in layers.values()):
        raise ValueError(f"S2 of `{adapter_name}` has been trained: choose its support before training.")
    sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        left, right = (x, gradient) if layers[name].input_first else (gradient, x)
        product = left.float().t() @ right.float()
        sums[name] = product if name not in sums else sums[name].add_(product)

    training = model.training
    model.eval()
    try:
        with watched(layers, add):
            for batch in batches:
                loss = model(**batch).loss
                parameters = [one for one in model.parameters() if one.requires_grad]
                torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        model.train(training)
    if not sums:
        raise ValueError("A support by gradient needs at least one batch, got none.")
    _sum_over_processes(sums)
    for name, layer in layers.items():
        layer.set_support(adapter_name, largest_support(sums[name], layer.sparse_hf_dsee_values[adapter_name].numel()))
