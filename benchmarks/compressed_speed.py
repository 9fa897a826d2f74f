"""How fast and how small are compressed checkpoints, beside a copy in memory, torch's CSR, zstd and another bitmask?

    python benchmarks/compressed_speed.py [--elements 4194304 --rounds 25] [--dtypes F32 BF16]

One core. A tensor of random weights with zeros at random places is copied (memcpy), compressed and expanded, in turns.
Figures are the shortest of the rounds, in this thread's processor time, so that other programs count less, as
fractions of memcpy's speed: 1 is as fast as memcpy. "compress" includes counting and the choice of the form. Memory is
the most that is held at once, in sizes of the tensor; what is given and what is returned count. zstd compresses the
dense bytes with level 1, where Python has it (3.14) or `zstandard` is installed. The other bitmask is that of
compressed-tensors (`pip install compressed-tensors==0.9.4`; later releases have none), where it is installed.

Ours comes three times: with the compiled loops that suit the processor, with those for processors without AVX-512
VBMI2 ("scalar"), and by numpy alone. Without `pip install "sparse_hf[fast]"` all three are the last. Compiling,
once in a process, is not counted but printed.

The last table is of `save_compressed(..., zstd=True)`, where `zstandard` is installed.

What loading takes is measured by `compressed_loading.py`.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch

from sparse_hf.algorithms import nonzeros
from sparse_hf.algorithms.compiled_loops import CompiledLoops, can_move_vectors, compiled_loops
from sparse_hf.storage.compressed_tensor import compress_tensor, expand_tensor


SPARSITIES = (0.5, 0.75, 0.9, 0.95)
OURS = [f"{way}{kind}" for kind in ("", " scalar", " numpy") for way in ("compress", "expand")]
KINDS = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "I8": np.dtype("u1")}


@functools.cache
def scalar_loops(itemsize: int) -> CompiledLoops | None:
    """The loops of processors without AVX-512 VBMI2."""
    return compiled_loops(itemsize) and CompiledLoops(itemsize, by_vectors=False)


@contextlib.contextmanager
def with_loops(choice: Callable[[int], CompiledLoops | None]) -> Iterator[None]:
    """Other loops than the processor's best."""
    usual, nonzeros.compiled_loops = nonzeros.compiled_loops, choice
    try:
        yield
    finally:
        nonzeros.compiled_loops = usual


def zstd_functions() -> tuple[Callable, Callable] | None:
    """Compress with level 1 and expand."""
    for name in ("compression.zstd", "zstandard"):
        try:
            found = importlib.import_module(name)
            return functools.partial(found.compress, level=1), found.decompress
        except ImportError:
            continue
    return None


def other_bitmask() -> type | None:
    """The former bitmask codec of compressed-tensors."""
    try:
        return importlib.import_module(
            "compressed_tensors.compressors.sparse_compressors.sparse_bitmask"
        ).BitmaskTensor
    except ImportError:
        return None


def shortest(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of processor time of each call, in turns; medians are at the mercy of who shares the core's caches."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: min(times) for name, times in seconds.items()}


def speed_row(dtype: str, sparsity: float, count: int, rounds: int) -> str:
    """A row of the table of speeds and sizes."""
    data = sparse_tensor(dtype, sparsity, count)
    elements = data.view(KINDS[dtype])
    copy, stored = np.empty_like(data), np.concatenate(compress_tensor(data, dtype, (count,)))
    back, form = expand_tensor(stored)
    assert (back == data).all()
    calls = {
        "memcpy": lambda: np.copyto(copy, data),
        "compress": lambda: compress_tensor(data, dtype, (count,)),
        "expand": lambda: expand_tensor(stored),
    }
    for name, choice in (("scalar", scalar_loops), ("numpy", lambda itemsize: None)):
        other = with_loops(choice)
        calls |= {f"compress {name}": other(calls["compress"]), f"expand {name}": other(calls["expand"])}
    if dtype == "F32":
        matrix = torch.from_numpy(elements.view(np.float32).reshape(-1, 1024))
        csr = matrix.to_sparse_csr()
        calls |= {"csr": matrix.to_sparse_csr, "csr back": csr.to_dense}
    if dtype != "I8" and (bitmask := other_bitmask()):
        dense = (
            torch.from_numpy(data).view(getattr(torch, {"F32": "float32", "BF16": "bfloat16"}[dtype])).view(-1, 1024)
        )
        other = bitmask.from_dense(dense)
        calls |= {"bitmask": lambda: bitmask.from_dense(dense), "bitmask back": other.decompress}
    if zstd := zstd_functions():
        small = zstd[0](data.tobytes())
        calls |= {"zstd": lambda: zstd[0](data.tobytes()), "zstd back": lambda: zstd[1](small)}
    seconds = shortest(calls, rounds)
    width, kept = elements.itemsize, form.nonzeros / count
    entropy = -(kept * math.log2(kept) + (1 - kept) * math.log2(1 - kept))
    sizes = [len(stored) / len(data), len(stored) / (count * (kept * width + 1 / 8))]
    sizes.append(len(stored) / (count * (kept * width + entropy / 8)))
    speeds = [
        f"{seconds['memcpy'] / seconds[name]:.2f}" if name in seconds else "-"
        for name in (*OURS, "csr", "csr back", "zstd", "zstd back", "bitmask", "bitmask back")
    ]
    rate, zstd_size = len(data) / seconds["memcpy"] / 1e9, f"{len(small) / len(data):.3f}" if zstd else "-"
    cells = [
        dtype,
        f"{sparsity:.0%}",
        form.form,
        *(f"{size:.3f}" for size in sizes),
        f"{rate:.1f}",
        *speeds,
        zstd_size,
    ]
    return f"| {' | '.join(cells)} |"


def sparse_tensor(dtype: str, sparsity: float, count: int) -> np.ndarray:
    """The bytes of random weights, zeros at random places."""
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.standard_normal(count).astype(np.float32))
    weights = weights.to({"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}[dtype]).view(torch.uint8)
    elements = weights.numpy().view(KINDS[dtype]).copy()
    elements[random.random(count) < sparsity] = 0
    return elements.view(np.uint8)


def coded_row(dtype: str, sparsity: float, count: int, rounds: int) -> str:
    """A row of the table of values coded by zstd."""
    data = sparse_tensor(dtype, sparsity, count)
    plain = sum(map(len, compress_tensor(data, dtype, (count,)) or [data]))
    stored = np.concatenate(compress_tensor(data, dtype, (count,), zstd=True))
    back, form = expand_tensor(stored)
    assert (back == data).all()
    copy = np.empty_like(data)
    calls = {
        "memcpy": lambda: np.copyto(copy, data),
        "compress": lambda: compress_tensor(data, dtype, (count,), zstd=True),
        "expand": lambda: expand_tensor(stored),
    }
    seconds = shortest(calls, rounds)
    cells = [dtype, f"{sparsity:.0%}", form.full_name, f"{len(stored) / len(data):.3f}", f"{len(stored) / plain:.3f}"]
    cells += [f"{seconds['memcpy'] / seconds[name]:.3f}" for name in ("compress", "expand")]
    return f"| {' | '.join(cells + held_at_once(data, dtype, count, zstd=True))} |"


def memory_row(dtype: str, sparsity: float) -> str:
    """What `held_at_once` finds."""
    count = 1 << 23
    held = held_at_once(sparse_tensor(dtype, sparsity, count), dtype, count)
    return f"| {dtype} | {sparsity:.0%} | {' | '.join(held)} |"


def held_at_once(data: np.ndarray, dtype: str, count: int, zstd: bool = False) -> list[str]:
    """The most that is held at once in compressing and in expanding, in tensors; what is given and returned counts."""
    stored = np.concatenate(compress_tensor(data, dtype, (count,), zstd))
    held = []
    for given, call in (
        (data, lambda: compress_tensor(data, dtype, (count,), zstd)),
        (stored, lambda: expand_tensor(stored)),
    ):
        tracemalloc.start()
        call()
        held.append((len(given) + tracemalloc.get_traced_memory()[1]) / len(data))
        tracemalloc.stop()
    return [f"{one:.2f}" for one in held]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtypes", nargs="+", default=["F32", "BF16"], choices=sorted(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in options.dtypes:
        start = time.perf_counter()
        loops = compiled_loops(KINDS[dtype].itemsize)
        taken = time.perf_counter() - start
        kind = ("vector" if can_move_vectors() else "scalar") if loops else "none"
        print(f"Loops for {dtype}: {kind}, compiled in {taken:.3f} s")
    print()
    head = [
        "dtype",
        "sparsity",
        "form",
        "size / dense",
        "size / (values + 1 bit)",
        "size / entropy bound",
        "memcpy GB/s",
    ]
    head += [*OURS, "torch to_sparse_csr", "torch to_dense", "zstd -1", "zstd back"]
    head += ["other bitmask", "other bitmask back", "zstd size / dense"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for dtype in options.dtypes:
        for sparsity in SPARSITIES:
            print(speed_row(dtype, sparsity, options.elements, options.rounds), flush=True)
    print("\n| dtype | sparsity | memory of compressing, tensors | of expanding |\n| --- | --- | --- | --- |")
    for dtype in options.dtypes:
        for sparsity in (SPARSITIES[0], SPARSITIES[2]):
            print(memory_row(dtype, sparsity), flush=True)
    if importlib.util.find_spec("zstandard"):
        head = ["dtype", "sparsity", "form", "size / dense", "size / without zstd", "compress", "expand"]
        head += ["memory of compressing, tensors", "of expanding"]
        print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for dtype in options.dtypes:
            for sparsity in (0.0, *SPARSITIES):
                print(coded_row(dtype, sparsity, options.elements, min(options.rounds, 5)), flush=True)


if __name__ == "__main__":
    main()
