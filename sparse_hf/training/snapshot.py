"""To what is a model rewound, bit for bit?

The snapshot lies on disk and is read back tensor by tensor: it costs no memory between rewinds, cannot alias live
weights (the released lottery-ticket code rewinds a model on the CPU to itself), and survives a killed process.

Where ranks hold parts of parameters (FSDP2, ZeRO), the file is the same: whole tensors, so that any number of ranks
reads it. Writing brings them together one by one; reading takes a rank's own part from the file and sends nothing.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparse_hf.algorithms.sharded_tensors import first_row, is_sharded, local_part, reshard, whole_of
from sparse_hf.algorithms.zero_partitions import is_partitioned, partition_of, whole_shape
from sparse_hf.storage.durable import write_file
from sparse_hf.storage.safetensors_output import SafetensorsOutput
from sparse_hf.storage.torch_dtypes import TORCH_DTYPES


DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def everything(name: str) -> bool:
    """Every tensor is wanted."""
    return True


def _state(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Every parameter once (ties by their first name) and every buffer that a state dict would hold."""
    reshard(model)
    stored = model.state_dict().keys()
    state = dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in stored}
    return {name: tensor for name, tensor in state.items() if wanted(name)}


@torch.no_grad()
def save_snapshot(
    model: nn.Module, path: Path, wanted: Callable[[str], bool] = everything, *, writes: bool = True
) -> None:
    """Write the parameters and persistent buffers whose full name is `wanted`, durably.

    One whole tensor at a time is in memory beside the model. Under ZeRO it is the fp32 masters that are written.

    Args:
        writes: whether this rank writes the file. Where parameters are sharded, all ranks call this together.
    """
    state = _state(model, wanted)
    if writes:
        write_file(path, lambda partial: _write(partial, state))
    else:
        for tensor in filter(is_sharded, state.values()):
            whole_of(local_part(tensor), tensor)  # what is needed from here


def _write(path: Path, state: dict[str, Tensor]) -> None:
    with SafetensorsOutput(path, {name: whole_shape(tensor) for name, tensor in state.items()}) as output:
        for name, tensor in state.items():
            whole = whole_of(local_part(tensor), tensor).cpu().contiguous()
            part = whole.view(-1).view(torch.uint8).numpy()
            output.append(name, DTYPE_NAMES[whole.dtype], tuple(whole.shape), [part] if part.size else [])
        output.finish()


@torch.no_grad()
def restore_snapshot(model: nn.Module, path: Path, wanted: Callable[[str], bool] = everything) -> None:
    """Copy the snapshot back into the live tensors whose full name is `wanted`, bit for bit, on any device.

    Where parameters are sharded, this rank's parts are read and nothing is sent. Under ZeRO they are written into the
    fp32 masters: `copy_masters_to_model` brings them to what the model computes with.

    Raises:
        ValueError: the model is not the one that was saved; it is unchanged.
    """
    live = _state(model, wanted)
    under_zero = any(map(is_partitioned, model.parameters()))
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        differing = stored ^ live.keys() or {
            name for name in live if not _fits(file.get_slice(name), live[name], under_zero)
        }
        if differing:
            raise ValueError(
                f"`{path}` was saved from another model: `{min(differing)}` is missing or has another shape or dtype. "
                "Resume with the model the run was started with, or choose another `output_dir`."
            )
        for name, tensor in live.items():
            _copy_part(file.get_slice(name), tensor)


def _fits(stored: object, tensor: Tensor, under_zero: bool) -> bool:
    """Whether a stored slice has the tensor's shape and dtype; copying between dtypes would round.

    Sharding may have made weights wider, which rounds nothing. What DeepSpeed leaves without a master it has cast to
    the dtype of training when it was given the model, as copying does here.
    """
    shape = stored.get_shape()
    if tuple(shape) != whole_shape(tensor):
        return False
    dtype, held = (stored[:0] if shape else stored[...]).dtype, local_part(tensor).dtype
    widened = is_sharded(tensor) and torch.promote_types(dtype, held) == held
    return dtype == held or under_zero or widened


def _copy_part(stored: object, tensor: Tensor) -> None:
    """Of the stored whole, what this rank holds."""
    held = local_part(tensor)
    if not is_sharded(tensor):
        held.copy_(stored[...])
    elif is_partitioned(tensor):
        held.copy_(_run(stored, partition_of(tensor).start, held.numel()))
    elif held.shape[0]:
        first = first_row(tensor)
        held.copy_(stored[first : first + held.shape[0]])


def _run(stored: object, start: int, length: int) -> Tensor:
    """Neighbours in the flat order of a stored tensor; the rows they lie in are read."""
    shape = stored.get_shape()
    if not length or not shape:
        return (stored[:0] if shape else stored[...]).reshape(-1)[:length]
    row = max(1, torch.Size(shape[1:]).numel())
    first = start // row
    rows = stored[first : -(-(start + length) // row)]
    return rows.reshape(-1)[start - first * row :][:length]
