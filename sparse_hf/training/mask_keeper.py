"""How do zeros stay zero while an optimizer runs?

The keeper hooks the innermost torch optimizer, so that it works below accelerate, gradient scaling and learning-rate
schedulers, and it knows tensors by the parameter objects that this optimizer steps. In a step it does three things:

1. gradients are masked once, before the clip norm is taken if the trainer calls `mask_gradients`, else just before the
   optimizer reads them;
2. weights are masked right after the update, whatever the update rule did;
3. optimizer moments are masked when masks change. With masked gradients they then stay zero by themselves in every
   rule that is elementwise; the keeper looks once after each change, and masks them after every step if they do not.
"""

from collections.abc import Iterator, Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sparse_hf.algorithms.masking import sign_extended, zero_pruned_


class MaskKeeper:
    """Keeps the pruned weights, gradients and moments of an optimizer's parameters at exactly zero."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
    ) -> None:
        """Attach to `optimizer` and zero the pruned weights at once.

        Args:
            optimizer: any torch optimizer, also wrapped by accelerate.
            parameters: the model's parameters by canonical name.
            masks: bool masks (True = kept) by canonical name; held as one byte per weight.

        Raises:
            ValueError: a masked parameter that requires gradients is not stepped by this optimizer, or is sharded.
        """
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._optimizer = optimizer
        self._parameters = {name: parameters[name] for name in masks}
        _check_owned(self._parameters, optimizer)
        self._bits: dict[str, Tensor] = {}
        self._gradients_masked = False
        self._masks_moments_always = False
        self._steps_since_change = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks; weights, gradients and moments of pruned positions become zero at once."""
        self._bits = {name: sign_extended(mask.to(self._parameters[name].device)) for name, mask in masks.items()}
        kept = sum(int(mask.sum()) for mask in masks.values())
        self._sparsity = 1 - kept / sum(mask.numel() for mask in masks.values())
        self._steps_since_change = 0
        self.mask_weights()
        self._mask_moments()
        self.mask_gradients()
        self._gradients_masked = False  # gradients of the next step are new

    @property
    def sparsity(self) -> float:
        """Fraction of the masked parameters' weights that are pruned."""
        return self._sparsity

    def masks(self) -> dict[str, Tensor]:
        """The bool masks, True = kept, by canonical name; a copy."""
        return {name: bits != 0 for name, bits in self._bits.items()}

    def mask_weights(self) -> None:
        """Zero the pruned weights."""
        for name, bits in self._bits.items():
            zero_pruned_(self._parameters[name].data, bits)

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights: call it before the clip norm is taken, once per optimizer step."""
        for name, bits in self._bits.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                zero_pruned_(gradient, bits)
        self._gradients_masked = True

    def detach(self) -> None:
        """Remove the hooks; the masks stay readable."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, *_: object) -> None:
        if not self._gradients_masked:
            self.mask_gradients()
        self._gradients_masked = False

    def _after_step(self, *_: object) -> None:
        self.mask_weights()
        self._steps_since_change += 1
        if self._steps_since_change == 2:
            # Moments that a first step created were masked by now; if a second one revived some, the rule is not
            # elementwise (or its state is no moment) and needs masking for good.
            self._masks_moments_always = self._has_pruned_moments()
        if self._steps_since_change == 1 or self._masks_moments_always:
            self._mask_moments()

    @torch.no_grad()
    def _mask_moments(self) -> None:
        for moment, bits in self._moments():
            zero_pruned_(moment, bits)

    @torch.no_grad()
    def _has_pruned_moments(self) -> bool:
        return any(bool((moment[bits == 0] != 0).any()) for moment, bits in self._moments())

    def _moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, bits in self._bits.items():
            for value in self._optimizer.state.get(self._parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == bits.shape and value.is_floating_point():
                    yield value, bits


def _check_owned(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) not in stepped:
            raise ValueError(
                f"Every masked weight must be stepped by the optimizer as it is, but {type(optimizer).__name__} does "
                f"not hold `{name}`. Sharded training (FSDP, DeepSpeed ZeRO) is not supported yet: use one process "
                "or DDP."
            )
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"Masked weights must be plain tensors, got a {type(parameter.data).__name__} for `{name}`. Sharded "
                "or quantised weights are not supported yet: use one process or DDP, unquantised."
            )
