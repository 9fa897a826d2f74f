"""How do zeros stay zero while an optimizer runs?

The keeper hooks the innermost torch optimizer, so that it works below accelerate, gradient scaling and learning-rate
schedulers, and it knows tensors by the parameter objects that this optimizer steps. In a step it does three things:

1. gradients are masked once, before the clip norm is taken if the trainer calls `mask_gradients`, else just before the
   optimizer reads them;
2. weights are masked right after the update, whatever the update rule did;
3. optimizer moments are masked when masks change. With masked gradients they then stay zero by themselves in every
   rule that is elementwise; the keeper looks once after each change, and masks them after every step if they do not.

Of sharded parameters (FSDP2) every rank keeps its own part, by masks of that part; a step communicates nothing.
"""

from collections.abc import Iterator, Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import is_sharded, local_part, sum_over_ranks, whole_of


class MaskKeeper:
    """Keeps the pruned weights, gradients and moments of an optimizer's parameters at exactly zero."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
    ) -> None:
        """Attach to `optimizer` and zero the pruned weights at once.

        Args:
            optimizer: any torch optimizer, also wrapped by accelerate.
            parameters: the model's parameters by canonical name.
            masks: bool masks (True = kept) by canonical name, of sharded parameters this rank's parts; held as one
                byte per weight.

        Raises:
            ValueError: a masked parameter that requires gradients is not stepped by this optimizer, or is sharded in
                a way that is not known.
        """
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._optimizer = optimizer
        self._parameters = {name: parameters[name] for name in masks}
        self._add = sum_over_ranks(self._parameters.values())
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
        self._sparsity = 1 - self._total_kept(masks) / sum(one.numel() for one in self._parameters.values())
        self._steps_since_change = 0
        self.mask_weights()
        self._mask_moments()
        self.mask_gradients()
        self._gradients_masked = False  # gradients of the next step are new

    @property
    def sparsity(self) -> float:
        """Fraction of the masked parameters' weights that are pruned."""
        return self._sparsity

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the masks."""
        return any(is_sharded(parameter) for parameter in self._parameters.values())

    def masks(self) -> dict[str, Tensor]:
        """The bool masks, True = kept, by canonical name; a copy. Of sharded parameters this rank's parts."""
        return {name: bits != 0 for name, bits in self._bits.items()}

    def whole_masks(self) -> Iterator[tuple[str, Tensor]]:
        """Each bool mask whole, one after the other, with its canonical name; all ranks ask together if sharded."""
        for name, bits in self._bits.items():
            yield name, whole_of(bits != 0, self._parameters[name])

    def mask_weights(self) -> None:
        """Zero the pruned weights."""
        for name, bits in self._bits.items():
            zero_pruned_(local_part(self._parameters[name]), bits)

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights: call it before the clip norm is taken, once per optimizer step."""
        for name, bits in self._bits.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                zero_pruned_(local_part(gradient), bits)
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
        found = any(bool((moment[bits == 0] != 0).any()) for moment, bits in self._moments())
        return bool(self._add(torch.tensor([int(found)])))  # ranks do the same

    def _moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, bits in self._bits.items():
            parameter = self._parameters[name]
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    yield local_part(value), bits

    def _total_kept(self, masks: Mapping[str, Tensor]) -> int:
        """Over all ranks, what each of them holds whole once."""
        here, whole = 0, 0
        for name, mask in masks.items():
            kept = int(mask.sum())
            here, whole = (here + kept, whole) if is_sharded(self._parameters[name]) else (here, whole + kept)
        return whole + int(self._add(torch.tensor([here])))


def _check_owned(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) not in stepped:
            raise ValueError(
                f"Every masked weight must be stepped by the optimizer as it is, but {type(optimizer).__name__} does "
                f"not hold `{name}`. DeepSpeed ZeRO and FSDP's first version are not supported yet: use one process, "
                "DDP or FSDP2."
            )
        if type(local_part(parameter)) is not Tensor:
            raise ValueError(
                f"Masked weights must be plain tensors, got a {type(parameter.data).__name__} for `{name}`. Quantised "
                "weights are not supported yet: train unquantised."
            )
