"""How long, in how much memory and how exactly is a Llama upcycled, beside mergekit's mixture script?

    python benchmarks/upcycle_mergekit.py [--megabytes 512 --experts 4 --rounds 3] [--folder FOLDER]

Needs `pip install mergekit` (0.1.5 was tried). Both make a Mixtral of copies of one dense bf16 Llama with random
routers, each as a command of its own in turns, into new folders on one disk, loading of Python included; ours without
its check of the logits. Memory is the command's peak. The error is the largest difference of the logits from the dense
model's, of the largest, in fp32 from the weights as written.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from upcycle_speed import dense_checkpoint

from sparse_hf.moe.layerwise_check import compare_layer_by_layer


OURS = """
import sys
from sparse_hf import upcycle
upcycle(*sys.argv[1:3], int(sys.argv[3]), check_tokens=0, progress=False)
"""
THEIRS = "from mergekit.scripts.moe import main; main()"


def run(code: str, *words: str) -> tuple[float, float]:
    """Seconds and MiB of a command; fails if it does."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(errors.decode()[-2000:])
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", help="any tokenizer's folder; mergekit wants one in the source")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        root = Path(place)
        source = root / "dense"
        dense_checkpoint(source, options.megabytes)
        if options.tokenizer:
            AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(source)
        experts = [{"source_model": str(source), "positive_prompts": [""]}] * options.experts
        recipe = {"base_model": str(source), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
        (root / "mixture.yml").write_text(json.dumps(recipe))  # JSON is YAML
        sides = {
            "sparse_hf": (OURS, str(source), str(root / "sparse_hf"), str(options.experts)),
            "mergekit-moe": (THEIRS, str(root / "mixture.yml"), str(root / "mergekit-moe")),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(options.rounds):
            for name, command in sides.items():
                found[name].append(run(*command))
                if turn < options.rounds - 1:
                    shutil.rmtree(root / name)
        print("| side | seconds | peak memory, MiB | logits' error |\n| --- | --- | --- | --- |")
        for name, runs in found.items():
            seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
            config = AutoConfig.from_pretrained(root / name)
            error = compare_layer_by_layer(source, root / name, config).logits
            print(f"| {name} | {seconds:.1f} | {peak:.0f} | {error:.1e} |")


if __name__ == "__main__":
    main()
