"""How fast and how small are compressed checkpoints, beside a copy in memory, torch's CSR, zstd and another bitmask?

    python benchmarks/compressed_speed.py [--elements 4194304 --rounds 9] [--dtypes F32 BF16] [--load]

One core. A tensor of random weights with zeros at random places is copied (memcpy), compressed and expanded, in turns.
Figures are medians of this thread's processor time, so that other programs count less, as fractions of memcpy's speed:
1 is as fast as memcpy. "compress" includes counting and the choice of the form. Memory is the most that is held at
once, in sizes of the tensor; what is given and what is returned count. zstd compresses the dense bytes with level 1,
where Python has it (3.14) or `zstandard` is installed. The other bitmask is that of compressed-tensors (`pip install
compressed-tensors==0.9.4`; later releases have none), where it is installed.

`--load` writes a BERT-base of 110 million random weights, densely and compressed, and loads both with
`AutoModel.from_pretrained` in turns, in fresh page cache ("from disk") and not. A dense checkpoint is only mapped by
loading and read when it is used, so both models are also read through once.
"""

import argparse
import functools
import importlib
import math
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel, BertConfig, BertModel

from sparse_hf import save_compressed
from sparse_hf.storage.compressed_tensor import compress_tensor, expand_tensor


SPARSITIES = (0.5, 0.75, 0.9, 0.95)
KINDS = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "I8": np.dtype("u1")}


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


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of processor time of each call, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_row(dtype: str, sparsity: float, count: int, rounds: int) -> str:
    """A row of the table of speeds and sizes."""
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.standard_normal(count).astype(np.float32))
    weights = weights.to({"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}[dtype]).view(torch.uint8)
    elements = weights.numpy().view(KINDS[dtype]).copy()
    elements[random.random(count) < sparsity] = 0
    data = elements.view(np.uint8)
    copy, stored = np.empty_like(data), np.concatenate(compress_tensor(data, dtype, (count,)))
    back, form = expand_tensor(stored)
    assert (back == data).all()
    calls = {
        "memcpy": lambda: np.copyto(copy, data),
        "compress": lambda: compress_tensor(data, dtype, (count,)),
        "expand": lambda: expand_tensor(stored),
    }
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
    seconds = medians(calls, rounds)
    width, kept = elements.itemsize, form.nonzeros / count
    entropy = -(kept * math.log2(kept) + (1 - kept) * math.log2(1 - kept))
    sizes = [len(stored) / len(data), len(stored) / (count * (kept * width + 1 / 8))]
    sizes.append(len(stored) / (count * (kept * width + entropy / 8)))
    speeds = [
        f"{seconds['memcpy'] / seconds[name]:.2f}" if name in seconds else "-"
        for name in ("compress", "expand", "csr", "csr back", "zstd", "zstd back", "bitmask", "bitmask back")
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


def memory_row(dtype: str, sparsity: float) -> str:
    """The most that is held at once, in tensors; what is given and what is returned count."""
    count = 1 << 23
    random = np.random.default_rng(0)
    elements = random.integers(1, 100, count).astype(KINDS[dtype])
    elements[random.random(count) < sparsity] = 0
    data = elements.view(np.uint8)
    stored = np.concatenate(compress_tensor(data, dtype, (count,)))
    held = []
    for given, call in (
        (data, lambda: compress_tensor(data, dtype, (count,))),
        (stored, lambda: expand_tensor(stored)),
    ):
        tracemalloc.start()
        call()
        held.append((len(given) + tracemalloc.get_traced_memory()[1]) / len(data))
        tracemalloc.stop()
    return f"| {dtype} | {sparsity:.0%} | {held[0]:.2f} | {held[1]:.2f} |"


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load_seconds(folder: Path, from_disk: bool, read: bool) -> tuple[float, float]:
    """Wall and processor seconds."""
    if from_disk:
        forget(folder)
    wall, processor = time.perf_counter(), time.process_time()
    model = AutoModel.from_pretrained(folder)
    if read:
        with torch.no_grad():
            sum(float(parameter.flatten()[::16].sum()) for parameter in model.parameters())
    return time.perf_counter() - wall, time.process_time() - processor


def load_rows(place: Path, sparsity: float, rounds: int) -> None:
    """Print the table of loading times."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = BertModel(BertConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(torch.rand(parameter.shape) < sparsity, 0)
    dense, small = place / f"dense-{sparsity}", place / f"small-{sparsity}"
    model.save_pretrained(dense)
    save_compressed(dense, small)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (dense, small)]
    for from_disk in (True, False):
        for read in (True, False):
            times = [
                (load_seconds(dense, from_disk, read), load_seconds(small, from_disk, read)) for _ in range(rounds)
            ]
            walls, processors = (
                [statistics.median(one[which][kind] for one in times) for which in (0, 1)] for kind in (0, 1)
            )
            cells = [
                f"{sparsity:.0%}",
                f"{sizes[1] / sizes[0]:.3f}",
                "yes" if from_disk else "",
                "yes" if read else "",
            ]
            for pair in (walls, processors):
                cells += [f"{pair[0]:.2f}", f"{pair[1]:.2f}", f"{pair[1] / pair[0]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["F32", "BF16"], choices=sorted(KINDS))
    parser.add_argument("--load", action="store_true", help="also loading")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "dtype",
        "sparsity",
        "form",
        "size / dense",
        "size / (values + 1 bit)",
        "size / entropy bound",
        "memcpy GB/s",
    ]
    head += ["compress", "expand", "torch to_sparse_csr", "torch to_dense", "zstd -1", "zstd back"]
    head += ["other bitmask", "other bitmask back", "zstd size / dense"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for dtype in options.dtypes:
        for sparsity in SPARSITIES:
            print(speed_row(dtype, sparsity, options.elements, options.rounds), flush=True)
    print("\n| dtype | sparsity | memory of compressing, tensors | of expanding |\n| --- | --- | --- | --- |")
    for dtype in options.dtypes:
        for sparsity in (SPARSITIES[0], SPARSITIES[2]):
            print(memory_row(dtype, sparsity), flush=True)
    if options.load:
        head = ["sparsity", "size / dense", "from disk", "read", "dense, s", "compressed, s", "ratio"]
        head += ["dense, processor s", "compressed, processor s", "ratio"]
        print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            for sparsity in (SPARSITIES[0], SPARSITIES[2]):
                load_rows(Path(place), sparsity, options.rounds)


if __name__ == "__main__":
    main()
