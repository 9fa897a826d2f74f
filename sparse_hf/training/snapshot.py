"""To what is a model rewound, bit for bit?

The snapshot lies on disk and is read back tensor by tensor: it costs no memory between rewinds, cannot alias live
weights (the released lottery-ticket code rewinds a model on the CPU to itself), and survives a killed process.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_hf.storage.durable import write_file


def everything(name: str) -> bool:
    """Every tensor is wanted."""
    return True


def _state(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Every parameter once (ties by their first name) and every buffer that a state dict would hold."""
    stored = model.state_dict().keys()
    state = dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in stored}
    return {name: tensor for name, tensor in state.items() if wanted(name)}


def save_snapshot(model: nn.Module, path: Path, wanted: Callable[[str], bool] = everything) -> None:
    """Write the parameters and persistent buffers whose full name is `wanted`, durably."""
    state = _state(model, wanted)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    write_file(path, lambda partial: save_file(tensors, partial))


def _fits(stored: object, tensor: Tensor) -> bool:
    """Whether a stored slice has the tensor's shape and dtype; copying between dtypes would round."""
    if stored.get_shape() != list(tensor.shape):
        return False
    return (stored[:0] if tensor.ndim else stored[...]).dtype == tensor.dtype


@torch.no_grad()
def restore_snapshot(model: nn.Module, path: Path, wanted: Callable[[str], bool] = everything) -> None:
    """Copy the snapshot back into the live tensors whose full name is `wanted`, bit for bit, on any device.

    Raises:
        ValueError: the model is not the one that was saved; it is unchanged.
    """
    live = _state(model, wanted)
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        differing = stored ^ live.keys() or {name for name in live if not _fits(file.get_slice(name), live[name])}
        if differing:
            raise ValueError(
                f"`{path}` was saved from another model: `{min(differing)}` is missing or has another shape or dtype. "
                "Resume with the model the run was started with, or choose another `output_dir`."
            )
        for name, tensor in live.items():
            tensor.copy_(file.get_tensor(name))
