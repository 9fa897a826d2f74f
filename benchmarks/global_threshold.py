"""Global magnitude pruning, threshold and masks: `keep_largest` against `torch.nn.utils.prune.global_unstructured`.

    python benchmarks/global_threshold.py                  # BERT-base shapes, 85 M weights, sparsity 0.6: 2 minutes
    python benchmarks/global_threshold.py --weights 7 --rounds 1

All sides run in one process, interleaved, on the same weights; medians and the ratios of medians are printed. The peak
of the extra memory is that of one run in a fresh process per side, results included. `kthvalue` is the short way by
hand: concatenate, `torch.kthvalue`, compare; it keeps too few weights when some tie at the threshold.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import prune

from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.algorithms.selection import keep_largest


LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
LAYER_WEIGHTS = sum(rows * columns for rows, columns in LAYER)


def main() -> None:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=85, help="millions of weights, in whole BERT-base layers")
    parser.add_argument("--sparsity", type=float, default=0.6, help="fraction to remove")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per side")
    parser.add_argument(
        "--peak-of", choices=SIDES, help="print the peak extra bytes of one run of this side, nothing else"
    )
    arguments = parser.parse_args()
    weights = make_weights(arguments.weights)
    num_keep = num_kept(sum(weight.numel() for weight in weights), arguments.sparsity)
    if arguments.peak_of:
        print(peak_extra_bytes(lambda: SIDES[arguments.peak_of](weights, num_keep)))
        return
    report(arguments, weights, num_keep)


def make_weights(millions: float) -> list[Tensor]:
    """Normal weights whose spread differs between matrices, as it does in trained models."""
    generator = torch.Generator().manual_seed(0)
    shapes = LAYER * max(1, round(millions * 1e6 / LAYER_WEIGHTS))
    return [torch.randn(shape, generator=generator) * (0.01 + 0.002 * (i % 7)) for i, shape in enumerate(shapes)]


def ours(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    return keep_largest(weights, num_keep, absolute=True)


def peer(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    modules = [torch.nn.Module() for _ in weights]
    for module, weight in zip(modules, weights, strict=True):
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    amount = sum(weight.numel() for weight in weights) - num_keep
    prune.global_unstructured([(m, "weight") for m in modules], pruning_method=prune.L1Unstructured, amount=amount)
    return [module.weight_mask for module in modules]


def kthvalue(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    magnitudes = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = torch.kthvalue(magnitudes, magnitudes.numel() - num_keep).values
    return [weight.abs() > threshold for weight in weights]


SIDES: dict[str, Callable[[list[Tensor], int], list[Tensor]]] = {"ours": ours, "kthvalue": kthvalue, "peer": peer}
TITLES = {
    "ours": "sparse_hf keep_largest",
    "kthvalue": "cat + kthvalue + compare",
    "peer": "prune.global_unstructured",
}


def report(arguments: argparse.Namespace, weights: list[Tensor], num_keep: int) -> None:
    """Print one line per side, with ratios to ours."""
    total = sum(weight.numel() for weight in weights)
    print(
        f"{total / 1e6:.1f} M weights, {num_keep:,} kept, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    seconds, masks = time_sides(weights, num_keep, arguments.rounds)
    peaks = {side: peak_in_new_process(side, arguments) for side in SIDES}
    print(f"{'':28}{'median s':>10}{'min s':>9}{'ours is x faster':>18}{'peak extra MiB':>16}{'of peer':>9}")
    for side, title in TITLES.items():
        median = statistics.median(seconds[side])
        ratio = median / statistics.median(seconds["ours"])
        memory = (
            f"{peaks[side] / 2**20:16.0f}{peaks[side] / peaks['peer']:9.3f}" if peaks["peer"] else "    not measured"
        )
        print(f"{title:28}{median:10.3f}{min(seconds[side]):9.3f}{ratio:18.1f}{memory}")
    print(compare(weights, masks["ours"], masks["peer"], num_keep))


def time_sides(weights: list[Tensor], num_keep: int, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each side, taking turns."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    masks = {}
    for _ in range(rounds):
        for side, run in SIDES.items():
            masks.pop(side, None)
            gc.collect()
            start = time.perf_counter()
            masks[side] = run(weights, num_keep)
            seconds[side].append(time.perf_counter() - start)
    return seconds, masks


def compare(weights: list[Tensor], ours: list[Tensor], theirs: list[Tensor], num_keep: int) -> str:
    """Both keep the same weights, but for those that tie with the smallest kept one: there topk is free to choose."""
    counts = [sum(int(mask.count_nonzero()) for mask in masks) for masks in (ours, theirs)]
    threshold = min(weight[mask].abs().min() for weight, mask in zip(weights, ours, strict=True) if mask.any())
    differing = [weight[mask != other.bool()].abs() for weight, mask, other in zip(weights, ours, theirs, strict=True)]
    number = sum(values.numel() for values in differing)
    if counts != [num_keep, num_keep] or any((values != threshold).any() for values in differing):
        sys.exit(f"FAILED: {counts} kept for {num_keep}, {number} differ, not all of them ties at {threshold}.")
    return f"same count, same kept weights; {number} chosen differently among those that tie at the threshold"


def peak_in_new_process(side: str, arguments: argparse.Namespace) -> int:
    """Bytes; 0 when this system cannot tell."""
    command = [sys.executable, __file__, "--peak-of", side]
    command += ["--weights", str(arguments.weights), "--sparsity", str(arguments.sparsity)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory rises above its level before the run; 0 (and a warning) off Linux."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to the present level
    except OSError as error:
        warnings.warn(f"peak memory is not measured: {error}", stacklevel=2)
        return 0
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM") - before
    del result
    return peak


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


if __name__ == "__main__":
    main()
