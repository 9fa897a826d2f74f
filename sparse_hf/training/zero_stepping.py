"""How does DeepSpeed ZeRO step weights, and how do the copies that the model computes with learn of new zeros?

ZeRO wraps a torch optimizer that holds flat fp32 masters instead of parameters, and steps it group by group, inside
the backward pass of the last micro-batch. Right after each call it copies masters into the model's weights. So what
was zeroed in the masters by a hook on the torch optimizer is zero in the model too, and nothing more is sent. Only
where masks change between steps, the copies have to be brought up to date.
"""

from collections.abc import Iterable, Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn

from sparse_hf.algorithms.masking import zero_pruned_
from sparse_hf.algorithms.sharded_tensors import local_part
from sparse_hf.algorithms.zero_partitions import place_in


# By the class of DeepSpeed's optimizer, the attribute with the flat masters that the torch optimizer steps.
MASTERS = {
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",  # stages 1 and 2
    "BF16_Optimizer": "fp32_groups_flat_partition",  # stage 1 in bf16 with fp32 gradients
    "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
}


def innermost(optimizer: torch.optim.Optimizer) -> "tuple[torch.optim.Optimizer, ZeroStepping | None]":
    """The torch optimizer below accelerate and DeepSpeed, and how ZeRO steps it, if it does.

    Raises:
        ValueError: DeepSpeed runs without ZeRO, or by a kind of ZeRO that is not known.
    """
    by_engine = False
    while isinstance(optimizer, AcceleratedOptimizer):
        by_engine = by_engine or isinstance(optimizer, DeepSpeedOptimizerWrapper)
        optimizer = optimizer.optimizer
    if not by_engine:
        return optimizer, None
    zero = ZeroStepping(optimizer)
    return zero.optimizer, zero


class ZeroStepping:
    """DeepSpeed's optimizer around `optimizer`, which steps the flat `masters` in `calls_per_step` calls."""

    def __init__(self, zero: object) -> None:
        kind = type(zero).__name__
        if kind not in MASTERS:
            raise ValueError(
                f"Under DeepSpeed, masks are kept by ZeRO-1, ZeRO-2 and ZeRO-3, got a `{kind}`. Set "
                "`zero_optimization.stage` to 1, 2 or 3, without ZenFlow and SuperOffload."
            )
        if kind.endswith("Stage3"):
            _check_in_memory(zero)
        self._zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer
        self.masters: list[Tensor] = list(getattr(zero, MASTERS[kind]))
        self.calls_per_step = 1 if kind == "BF16_Optimizer" else len(self.masters)

    def find(self, run: Tensor) -> tuple[Tensor, slice]:
        """In which master a run of weights lies, and where; an empty tensor for an empty run."""
        for master in self.masters:
            if (place := place_in(master, run)) is not None:
                return master, place
        if run.numel():
            raise ValueError("A masked weight must be among ZeRO's masters, but was not found: leave it dense.")
        return run, slice(0, 0)

    def update_model(self, parameters: Mapping[str, nn.Parameter], bits: Mapping[str, Tensor]) -> None:
        """Bring zeros from the masters to what the model computes with; all ranks together.

        Args:
            parameters: the masked ones, by name.
            bits: of this rank's runs, as `zero_pruned_` takes them.
        """
        if not type(self._zero).__name__.endswith("Stage3"):
            self._zero.update_lp_params()  # as after a step
            return
        for name, parameter in parameters.items():
            run = parameter.ds_tensor.detach()[: bits[name].numel()]
            zero_pruned_(run, bits[name].to(run.device))
        self._gather_small()

    def copy_to_model(self, parameters: Iterable[nn.Parameter]) -> None:
        """Bring new values from the masters to what the model computes with; all ranks together.

        Args:
            parameters: those that changed.
        """
        if not type(self._zero).__name__.endswith("Stage3"):
            self._zero.update_lp_params()  # as after a step
            return
        for parameter in parameters:
            masters = local_part(parameter)
            parameter.ds_tensor.detach()[: masters.numel()].copy_(masters)
        self._gather_small()

    def _gather_small(self) -> None:
        """Of ZeRO-3, what has copies of the parts that ranks hold."""
        self._zero.invalidate_secondary_tensor()
        if self._zero.persistent_parameters:  # small ones, which stay gathered between steps
            self._zero._partition_all_parameters()
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def copy_masters_to_model(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Bring values that were written into `local_part(parameter)` to what the model computes with; all ranks together.

    Nothing, unless DeepSpeed steps masters.

    Args:
        optimizer: the Trainer's, or None before there is one.
        parameters: those that changed.
    """
    zero = None if optimizer is None else innermost(optimizer)[1]
    if zero is not None:
        zero.copy_to_model(parameters)


def _check_in_memory(zero: object) -> None:
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise ValueError(
            "ZeRO-3 must keep weights and optimizer in memory to mask them, got NVMe: offload to the CPU."
        )
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise ValueError(
            f"ZeRO-3 must offload all of the optimizer or nothing, got `ratio` {zero.partial_offload}: set it to 1.0."
        )
