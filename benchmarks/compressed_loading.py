"""How long does loading a compressed checkpoint take, beside the dense one, from disk and from memory?

    python benchmarks/compressed_loading.py [--rounds 7] [--dtypes fp32 bf16] [--sparsities 0.5 0.8 0.9] [--layers 12]

BERT-base, 110 million random weights with zeros at random places in every matrix (embeddings too), is loaded by
`AutoModel.from_pretrained`, and every weight is read once (the sum of each parameter), as a first forward pass does:
stock loading only maps a dense file into memory, and what the disk and the page faults cost comes then. Dense and
compressed take turns, each in a fork of this process, which has loaded a tiny model of both kinds before.

Compressed comes three times: with the compiled loops that suit the processor, with those for processors without
AVX-512 VBMI2 ("scalar"), and by numpy alone. Without `pip install "sparse_hf[fast]"` all are the last. Importing
the compiler and compiling is counted.

"disk": the checkpoint's files were taken out of the page cache right before (`posix_fadvise`), and `mincore` agrees
that no page of the weights is left. "memory": every page is there. Times are medians, wall and processor (of all
threads). Beside them how fast the dense file is read in one go, equally cold or not, measured between the rounds.
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel, BertConfig, BertModel

from sparse_hf import save_compressed
from sparse_hf.algorithms import compiled_loops, nonzeros


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def weights_of(folder: Path) -> Path:
    """The one file of weights."""
    (found,) = folder.glob("*.safetensors")
    return found


def resident(file: Path) -> float:
    """The share of the file's pages that are in the page cache."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        view = np.frombuffer(mapped, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
        if ctypes.CDLL(None, use_errno=True).mincore(address, length, pages):
            raise OSError(ctypes.get_errno(), "mincore failed")
        del view
        return float((np.frombuffer(pages.raw, np.uint8) & 1).mean())


def take_out(folder: Path) -> None:
    """Take the files out of the page cache, for sure."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    left = resident(weights_of(folder))
    if left:
        raise RuntimeError(f"{left:.1%} of `{folder}` stayed in the page cache; does another program have it mapped?")


def bring_in(folder: Path) -> None:
    """Read the weights, so that they are in the page cache."""
    while resident(weights_of(folder)) < 1:
        weights_of(folder).read_bytes()


def load_and_read(folder: Path) -> None:
    """What is timed."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()


def scalar_loops(folder: Path) -> None:
    """What is timed, on a processor without AVX-512 VBMI2."""
    compiled_loops.FOR_VECTORS = ("none such",)
    load_and_read(folder)


def by_numpy(folder: Path) -> None:
    """What is timed, without compiled loops."""
    nonzeros.WORTH_COMPILING = 1 << 62
    load_and_read(folder)


def read_at_once(folder: Path) -> None:
    """The dense file by one plain read after the other: what the disk gives."""
    with weights_of(folder).open("rb", buffering=0) as opened:
        buffer = bytearray(8 << 20)
        while opened.readinto(buffer):
            pass


def in_a_fork(work: Callable, *arguments: object) -> tuple[float, float]:
    """Wall and processor seconds of `work(*arguments)` in a process that has allocated nothing for it yet."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            wall, processor = time.perf_counter(), time.process_time()
            work(*arguments)
            times = time.perf_counter() - wall, time.process_time() - processor
            os.write(writer, json.dumps(times).encode())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with open(reader, "rb") as answer:
        found = answer.read()
    if not found:
        raise RuntimeError(f"A process has failed (status {status}), see above.")
    return tuple(json.loads(found))


def folders_of(place: Path, dtype: str, sparsity: float) -> tuple[Path, Path]:
    """Of the dense and of the compressed checkpoint."""
    return place / f"dense-{dtype}-{sparsity}", place / f"small-{dtype}-{sparsity}"


def make(place: Path, layers: int, dtype: str, sparsity: float) -> None:
    """Save the dense and the compressed checkpoint."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{"num_hidden_layers": layers} if layers else TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02).masked_fill_(torch.rand(parameter.shape) < sparsity, 0)
    dense, small = folders_of(place, dtype, sparsity)
    model.to(DTYPES[dtype]).save_pretrained(dense)
    save_compressed(dense, small)


def rows(place: Path, layers: int, dtype: str, sparsity: float, rounds: int) -> None:
    """Measure and print one checkpoint, from disk and from memory."""
    folders = folders_of(place, dtype, sparsity)
    in_a_fork(make, place, layers, dtype, sparsity)  # or every later fork would first copy what this left in memory
    sizes = [weights_of(folder).stat().st_size for folder in folders]
    ways = {"dense": (load_and_read, folders[0]), "ours": (load_and_read, folders[1])}
    ways |= {"scalar": (scalar_loops, folders[1]), "numpy": (by_numpy, folders[1])}
    for prepare, name in ((take_out, "disk"), (bring_in, "memory")):
        times: dict[str, list] = {way: [] for way in ways}
        rates = []
        for turn in range(rounds):
            for way, (work, folder) in list(ways.items())[:: 1 if turn % 2 else -1]:
                prepare(folder)
                times[way].append(in_a_fork(work, folder))
            prepare(folders[0])
            rates.append(sizes[0] / in_a_fork(read_at_once, folders[0])[0] / 1e9)
        cells = [dtype, f"{sparsity:.0%}", f"{sizes[0] / 1e6:.0f} MB", f"{sizes[1] / sizes[0]:.3f}", name]
        cells.append(f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})")
        for kind in (0, 1):
            dense, *others = (statistics.median(one[kind] for one in times[way]) for way in ways)
            cells.append(f"{dense:.2f}")
            for other in others:
                cells += [f"{other:.2f}", f"**{other / dense:.2f}**"]
        shortest = [min(wall for wall, _ in times[way]) for way in ways]
        cells.append(", ".join(f"{one / shortest[0]:.2f}" for one in shortest[1:]))
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)  # or a fork would wait for threads that it has not
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{os.cpu_count()} cores, of which {os.getloadavg()[0]:.1f} were busy in the last minute\n")
    head = ["dtype", "sparsity", "dense", "size", "from", "plain reads, GB/s", "dense, wall s", "compressed", "ratio"]
    head += ["scalar", "ratio", "by numpy", "ratio", "dense, processor s", "compressed", "ratio"]
    head += ["scalar", "ratio", "by numpy", "ratio"]
    head += ["ratios of the shortest wall times"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        in_a_fork(make, Path(place), 0, "fp32", 0.99)
        for folder in folders_of(Path(place), "fp32", 0.99):
            load_and_read(folder)  # imports what is imported late
        for dtype in options.dtypes:
            for sparsity in options.sparsities:
                rows(Path(place), options.layers, dtype, sparsity, options.rounds)
    print(f"\n{os.getloadavg()[0]:.1f} busy in the last minute, this one included")


if __name__ == "__main__":
    main()
