"""How fast and in how much memory are shards of a mixture of experts written, beside `cp` of the same bytes?

    python benchmarks/upcycle_speed.py [--megabytes 256 --experts 4 --rounds 5] [--folder FOLDER]

A dense Llama checkpoint of about the given size is written with random bf16 weights. Then sparse_hf writes its
mixture of experts and `cp` copies that mixture, in turns, each flushed to disk, each into a new folder on the same
disk; for copies, for parts whose down matrices are scaled, and for Drop-Upcycling. The check of logits is left out.
Memory is the growth of the peak of resident memory in a process that only writes.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.plan_upcycling import UpcyclingPlan, plan_upcycling
from sparse_hf.storage.shard_writer import write_shards


HIDDEN, NEURONS, VOCABULARY = 1024, 2816, 4096
MODES = {
    "copies": (2, ExpertInit()),
    "parts of a quarter": (4, ExpertInit(granularity=4)),
    "drop": (2, ExpertInit(drop=0.5)),
}


def dense_checkpoint(folder: Path, megabytes: int) -> None:
    """A Llama with as many layers as make the size."""
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * NEURONS)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        vocab_size=VOCABULARY,
        num_attention_heads=16,
        num_hidden_layers=max(1, (megabytes << 20) // per_layer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def peak() -> int:
    """Highest resident memory of this process so far, in bytes (a child starts its own)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def growth(plan: UpcyclingPlan, folder: Path, answer: multiprocessing.Queue) -> None:
    """Write once, and answer by how much the peak grew."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    write_shards(folder, plan.shards, plan.digest)
    answer.put(peak() - before)


def copied(source: Path, folder: Path) -> float:
    """Seconds of `cp` until the bytes are on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, folder], check=True)
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(root: Path, mode: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    top_k, init = MODES[mode]
    target = root / mode
    plan = plan_upcycling(root / "dense", target, options.experts, top_k, max_shard_bytes=1 << 28, init=init)
    ours, theirs = [], []
    for number in range(options.rounds):
        start = time.perf_counter()
        write_shards(root / f"moe-{number}", plan.shards, plan.digest)
        ours.append(time.perf_counter() - start)
        theirs.append(copied(root / f"moe-{number}", root / f"copy-{number}"))
        shutil.rmtree(root / f"copy-{number}")
        shutil.rmtree(root / f"moe-{number}")
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=growth, args=(plan, target, answer))
    child.start()
    grown = answer.get()
    child.join()
    shutil.rmtree(target)
    speed, cp = statistics.median(ours), statistics.median(theirs)
    rates = f"{plan.bytes / speed / 1e6:.0f} | {plan.bytes / cp / 1e6:.0f} | {cp / speed:.2f}"
    return f"| {mode} | {plan.bytes / 1e9:.2f} GB | {rates} | {grown / 2**20:.0f} |"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    print("| mode | written | MB/s | cp, MB/s | of cp's | memory grew, MiB |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        dense_checkpoint(Path(place) / "dense", options.megabytes)
        for mode in MODES:
            print(measure(Path(place), mode, options), flush=True)


if __name__ == "__main__":
    main()
