"""How do zeros stay zero while an optimizer runs?

The keeper hooks the innermost torch optimizer, so that it works below accelerate, gradient scaling and learning-rate
schedulers, and it knows tensors by the parameter objects that this optimizer steps. In a step it does three things:

1. gradients are masked once, before the clip norm is taken if the trainer calls `mask_gradients`, else just before the
   optimizer reads them;
2. weights are masked right after the update, whatever the update rule did;
3. optimizer moments are masked when masks change. With masked gradients they then stay zero by themselves in every
   rule that is elementwise; the keeper looks once after each change, and masks them after every step if they do not.

Of sharded parameters (FSDP2, ZeRO) every rank keeps its own part, by masks of that part; a step communicates nothing.
Under ZeRO that part is a run of flat fp32 masters, stepped inside the backward pass: see `zero_stepping.py`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.block_scan import count_kept
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import is_sharded, local_part, sum_over_ranks, whole_of
from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.training.zero_stepping import ZeroStepping, innermost


@dataclass(frozen=True)
class Stepped:
    """Where the optimizer holds this rank's weights of a parameter.

    Attributes:
        holder: the tensor that the optimizer steps: the parameter, or under ZeRO a flat tensor of many.
        within: where in a flat holder they lie.
    """

    holder: Tensor
    within: slice | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's weights, gradients or moments in the holder or a tensor shaped like it: a view."""
        return local_part(tensor) if self.within is None else tensor.detach()[self.within]

    @property
    def weights(self) -> Tensor:
        """This rank's weights."""
        return self.part(self.holder)


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
        optimizer, self._zero = innermost(optimizer)
        self._optimizer = optimizer
        self._parameters = {name: parameters[name] for name in masks}
        self._add = sum_over_ranks(self._parameters.values())
        self._stepped = {name: _stepped(one, self._zero) for name, one in self._parameters.items()}
        if self._zero is None:
            _check_owned(self._parameters, optimizer)
        self.shapes = {name: whole_shape(one) for name, one in self._parameters.items()}
        self._bits: dict[str, Tensor] = {}
        self._gradients_masked = False
        self._masks_moments_always = False
        self._calls_since_change = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks, all of them; weights, gradients and moments of pruned positions become zero at once."""
        for name, mask in masks.items():  # one by one, so that old and new bits are never all there together
            self._bits[name] = sign_extended(mask.to(self._stepped[name].weights.device))
        self._sparsity = 1 - self._total_kept(masks) / sum(math.prod(shape) for shape in self.shapes.values())
        self._calls_since_change = 0
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
        """Zero the pruned weights; between steps, and on all ranks together."""
        self._mask_weights(self._bits)
        if self._zero is not None:
            self._zero.update_model(self._parameters, self._bits)

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights: call it before the clip norm is taken, once per optimizer step.

        DeepSpeed takes that norm and steps before a trainer can call anything. There this does nothing, and gradients
        are masked when the optimizer is about to read them.
        """
        if self._zero is None:
            self._mask_gradients(self._bits)
            self._gradients_masked = True

    def detach(self) -> None:
        """Remove the hooks; the masks stay readable."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, *_: object) -> None:
        if self._zero is not None:
            self._mask_gradients(self._being_stepped())
        elif not self._gradients_masked:
            self.mask_gradients()
        self._gradients_masked = False

    def _after_step(self, *_: object) -> None:
        self._mask_weights(self._being_stepped())
        self._calls_since_change += 1
        steps, remainder = divmod(self._calls_since_change, 1 if self._zero is None else self._zero.calls_per_step)
        if remainder:
            return
        if steps == 2:
            # Moments that a first step created were masked by now; if a second one revived some, the rule is not
            # elementwise (or its state is no moment) and needs masking for good.
            self._masks_moments_always = self._has_pruned_moments()
        if steps == 1 or self._masks_moments_always:
            self._mask_moments()

    def _being_stepped(self) -> Iterable[str]:
        """The names of what the running call of the optimizer steps: all, or under ZeRO what is in its groups now."""
        if self._zero is None:
            return self._bits
        held = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        return [name for name in self._bits if id(self._stepped[name].holder) in held]

    def _mask_weights(self, names: Iterable[str]) -> None:
        for name in names:
            zero_pruned_(self._stepped[name].weights, self._bits[name])

    def _mask_gradients(self, names: Iterable[str]) -> None:
        for name in names:
            gradient = self._stepped[name].holder.grad
            if gradient is not None:
                zero_pruned_(self._stepped[name].part(gradient), self._bits[name])

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
            stepped = self._stepped[name]
            for value in self._optimizer.state.get(stepped.holder, {}).values():
                if isinstance(value, Tensor) and value.shape == stepped.holder.shape and value.is_floating_point():
                    yield stepped.part(value), bits

    def _total_kept(self, masks: Mapping[str, Tensor]) -> int:
        """Over all ranks, what each of them holds whole once."""
        here, whole = 0, 0
        for name, mask in masks.items():
            kept = count_kept(mask)
            here, whole = (here + kept, whole) if is_sharded(self._parameters[name]) else (here, whole + kept)
        return whole + int(self._add(torch.tensor([here])))


def _stepped(parameter: nn.Parameter, zero: ZeroStepping | None) -> Stepped:
    if zero is None or not parameter.requires_grad:
        return Stepped(parameter)
    return Stepped(*zero.find(local_part(parameter)))


def _check_owned(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) not in stepped:
            raise ValueError(
                f"Every masked weight must be stepped by the optimizer as it is, but {type(optimizer).__name__} does "
                f"not hold `{name}`. FSDP's first version is not supported: use one process, DDP, FSDP2 or ZeRO."
            )
        if type(local_part(parameter)) is not Tensor:
            raise ValueError(
                f"Masked weights must be plain tensors, got a {type(parameter.data).__name__} for `{name}`. Quantised "
                "weights are not supported yet: train unquantised."
            )
