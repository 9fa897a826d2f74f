"""Weights of a checkpoint that names or lays out its tensors otherwise than the model in memory.

Transformers 5 saves many models in the layout of their first release: a mixture of experts as one matrix per expert,
though it holds them as stacks. `from_pretrained` converts them; the Trainer's own loading, when it resumes or takes
the best checkpoint, does not: it passes over unknown names and goes on with the weights that it has.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_hf.storage.tensor_headers import INDEX_FILE, SINGLE_FILE, read_headers


def needs_conversion(model: nn.Module, checkpoint: Path) -> bool:
    """Whether the weights in `checkpoint`, in one file or in shards, have names that `model`'s state dict has not.

    False for what is not a stock model's checkpoint: an adapter's, an FSDP or DeepSpeed one, a pickled one.

    Raises:
        FileNotFoundError, ValueError: a safetensors file is damaged, or a shard is missing.
    """
    is_there = any((checkpoint / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if not isinstance(model, PreTrainedModel) or not is_there:
        return False
    return not read_headers(checkpoint).keys() <= model.state_dict().keys()


def load_converted(model: PreTrainedModel, checkpoint: Path) -> None:
    """Fill `model`, in place and bit for bit, with the weights that `from_pretrained` reads from `checkpoint`.

    A second model is held in the CPU's memory meanwhile. The global random number generators stay as they are.

    Raises:
        ValueError: the checkpoint does not fill the model; the model is unchanged.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    # float32 holds every value of the shorter types, so that a model of several dtypes is filled exactly too.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    with torch.random.fork_rng([]):
        loaded, info = type(model).from_pretrained(
            checkpoint,
            config=copy.deepcopy(model.config),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    wrong = {
        "is missing": sorted(info["missing_keys"]),
        "is unknown": sorted(info["unexpected_keys"]),
        "has another shape": sorted(entry[0] for entry in info["mismatched_keys"]),
    }
    for problem, names in wrong.items():
        if names:
            raise ValueError(
                f"The checkpoint `{checkpoint}` must hold the weights of {type(model).__name__}, but `{names[0]}` "
                f"{problem} ({len(names)} such). It is damaged or of another model: continue from another one."
            )
    model.load_state_dict(loaded.state_dict())
