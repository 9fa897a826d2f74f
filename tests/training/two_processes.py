"""Runs a function of a test module in two processes that train together over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparse_hf
import training
from training.tiny_training import assert_same


# Importing takes longer than tiny trainings, so it is done once, in front of the fork.
SCRIPT = """
import importlib, os, sys
module, function, folder = sys.argv[1:]
run = getattr(importlib.import_module(module), function)
children = []
for rank in range(int(os.environ["WORLD_SIZE"])):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        run(folder)
        sys.exit()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def run_two(module: str, function: str, folder: Path, **environment: str) -> None:
    """Call `module.function(folder)` in two processes at once; what either prints is shown if one fails."""
    run_processes(2, module, function, folder, **environment)


def run_processes(number: int, module: str, function: str, folder: Path, **environment: str) -> None:
    """As `run_two`, in as many processes, in a process group in any case."""
    ended = launch(number, module, function, folder, **environment)
    assert ended.returncode == 0, ended.stdout.decode()[-6000:]


def launch(
    number: int, module: str, function: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Call `module.function(folder)` in that many processes at once, whatever becomes of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch has no gloo here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [Path(sparse_hf.__file__).parents[1], Path(next(iter(training.__path__))).parent]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, module, function, str(folder)],
        env={**os.environ, **shared},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def leave_found(found: dict[str, Tensor], folder: Path) -> None:
    """What one of the two did comes to its end: what it found is for `found_by_both`, and the group is taken apart."""
    save_file(
        {name: one.contiguous() for name, one in found.items()}, folder / f"rank-{os.environ['RANK']}.safetensors"
    )
    dist.barrier()
    dist.destroy_process_group()


def without_compiling() -> None:
    """DeepSpeed compiles for a minute, for faster sums on CPUs, unless it is told not to."""
    import deepspeed.comm.torch  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def found_by_both(folder: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What the two wrote to `rank-0.safetensors` and `rank-1.safetensors`, which must be equal.

    Names are case/kind/parameter, and so are the dictionaries nested.
    """
    first, second = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    found: dict = {}
    for name, tensor in first.items():
        case, kind, parameter = name.split("/", 2)
        found.setdefault(case, {}).setdefault(kind, {})[parameter] = tensor
    return found
