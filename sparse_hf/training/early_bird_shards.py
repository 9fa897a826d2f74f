"""An early-bird search where ranks hold parts of the model (FSDP2, ZeRO): from what is the smaller model made?

From a file: `start.safetensors` holds the whole model, and every rank cuts its own copy of the smaller one out of the
file, which the operating system reads once for all ranks of a machine. Nothing is gathered or sent. What the file does
not say (classes, config, ties, buffers that are not saved) is kept from before the model was split, without weights.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from sparse_hf.algorithms.sharded_tensors import local_part
from sparse_hf.algorithms.zero_partitions import is_partitioned, place_in, whole_shape
from sparse_hf.tickets.coefficients import UnitCoefficients
from sparse_hf.training.forget_training import ENGINES_OWN


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and persistent buffers are whole but on the meta device; ties stay ties."""
    stored, known = model.state_dict().keys(), {}
    for parameter in model.parameters():
        empty = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
        known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if name in stored:
            known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, known)


def fill_from(empty: nn.Module, path: Path) -> nn.Module:
    """Give a model from `without_weights` those of a snapshot, in place, on the CPU: pages of the file, until written.

    Raises:
        ValueError: the snapshot is of another model; nothing was changed.
    """
    stored, made = load_file(path), {}
    wanted = dict(empty.named_parameters()) | {name: one for name, one in empty.named_buffers() if one.is_meta}
    wrong = stored.keys() ^ wanted.keys() or {
        name for name, one in wanted.items() if (stored[name].shape, stored[name].dtype) != (one.shape, one.dtype)
    }
    if wrong:
        raise ValueError(
            f"`{path}` was saved from another model: `{min(wrong)}` is missing or has another shape or dtype. "
            "Resume with the model the run was started with, or choose another `output_dir`."
        )
    for name, one in wanted.items():
        made[id(one)] = _like(one, stored[name])
    for module in empty.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[id(one)] for name, one in tensors.items() if id(one) in made})
    return empty


def _like(one: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=one.requires_grad) if isinstance(one, nn.Parameter) else values


@contextlib.contextmanager
def built_whole(trainer: "SparseTrainer") -> Iterator[None]:
    """Transformers makes models for ZeRO-3 while its config is known, which does not do for models without weights."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)


@contextlib.contextmanager
def gathered_where_used(model: nn.Module, coefficients: UnitCoefficients) -> Iterator[None]:
    """Let ZeRO-3 bring each coefficient together where it is used, as it does with a module's own parameters."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter, unregister_external_parameter

    # The module around the one that reads the units: in front of the latter's own forward they are multiplied.
    users = [model.get_submodule(one.output.rpartition(".")[0]) for one in coefficients.units]
    for user, value in zip(users, coefficients.values, strict=True):
        register_external_parameter(user, value)
    try:
        yield
    finally:
        for user, value in zip(users, coefficients.values, strict=True):
            unregister_external_parameter(user, value)


def forget_engine(coefficients: UnitCoefficients) -> None:
    """Let nothing of DeepSpeed's hang on coefficients that are read: they would keep its masters and moments."""
    for value in coefficients.values:
        for name in ENGINES_OWN:
            value.__dict__.pop(name, None)


@torch.no_grad()
def add_l1_gradient(coefficients: UnitCoefficients, strength: float, optimizer: torch.optim.Optimizer) -> None:
    """As `UnitCoefficients.add_l1_gradient`, also where ZeRO steps flat masters, some in each call of `optimizer`."""
    if not any(map(is_partitioned, coefficients.values)):
        coefficients.add_l1_gradient(strength)
        return
    masters = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    for value in coefficients.values:
        run = local_part(value)
        for master in masters:
            if (place := place_in(master, run)) is not None:
                master.grad[place].add_(run.sign(), alpha=strength)
