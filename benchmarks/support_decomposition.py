"""Where DSEE's sparse update goes: `sparse_low_rank` against the procedure of DSEE's released code (GreBsmo).

    python benchmarks/support_decomposition.py                          # 768 x 768, 10 of the 100 outer iterations
    python benchmarks/support_decomposition.py --outer 100 --rounds 1   # the whole procedure

Both sides run in one process, in turns, on the same Gaussian matrix, each round with another seed. Its deviation is
that of trained weights by default, as the original's threshold of 0.01 depends on it. Medians and their ratio are
printed, and how many entries of the support two rounds share on average. The original is written anew from a
description of what the released code does. Its outer iterations grow dearer, as each raises the rank by 5: the time of
fewer than 100, scaled to 100 in proportion, is too low, and so is the ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from sparse_hf.algorithms.sparse_low_rank import sparse_low_rank
from sparse_hf.algorithms.supports import largest_support


ORIGINAL_OUTER = 100
THRESHOLD, RANK_STEP, INNER = 0.01, 5, 2


def original(weight: Tensor, nnz: int, outer: int, generator: torch.Generator) -> Tensor:
    """The released procedure; only its cut to the N largest entries is ours, which avoids the trap of too few."""
    rows = torch.randn(1, weight.shape[1], generator=generator)
    for _ in range(outer):
        sparse = torch.zeros_like(weight)
        for _ in range(INNER):
            columns = torch.linalg.qr((weight - sparse) @ rows.T).Q
            rows = columns.T @ (weight - sparse)
            residual = weight - columns @ rows
            sparse = torch.where(residual.abs() < THRESHOLD, 0.0, residual)
        left = torch.linalg.qr(residual - sparse).R
        rows = torch.cat([rows, left[:RANK_STEP]])
    return largest_support(sparse, nnz)


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    support = function()
    return time.perf_counter() - start, support


def shared(supports: list[Tensor]) -> str:
    """Mean number of entries that two seeds share."""
    pairs = [int(torch.isin(one, other).sum()) for one, other in combinations(supports, 2)]
    return f"{statistics.mean(pairs):.1f}" if pairs else "-"


def main() -> None:
    """Time the supports and count what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=768, help="rows and columns")
    parser.add_argument("--deviation", type=float, default=0.04, help="of the Gaussian weights")
    parser.add_argument("--nnz", type=int, default=64, help="entries of the support")
    parser.add_argument("--rank", type=int, default=8, help="of our low-rank part")
    parser.add_argument("--outer", type=int, default=10, help="outer iterations of the original, which has 100")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    weight = options.deviation * torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    sides = {
        "ours": lambda seed: sparse_low_rank(weight, options.nnz, options.rank, generator=seed).support,
        "original": lambda seed: original(weight, options.nnz, options.outer, seed),
    }
    results = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side, function in sides.items():
            generator = torch.Generator().manual_seed(1 + turn)
            results[side].append(timed(lambda function=function, generator=generator: function(generator)))
    report(options, largest_support(weight, options.nnz), results)


def report(options: argparse.Namespace, top: Tensor, results: dict[str, list[tuple[float, Tensor]]]) -> None:
    """Print one line per side and the ratio of the times."""
    print(
        f"{options.size} x {options.size} Gaussian of deviation {options.deviation}, {options.nnz} entries, "
        f"rank {options.rank}, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}\n"
    )
    print("| side | seconds | shared by two seeds | shared with top-abs(W) |\n| --- | --- | --- | --- |")
    seconds = {side: statistics.median(time for time, _ in runs) for side, runs in results.items()}
    for side, runs in results.items():
        supports = [support for _, support in runs]
        top_shared = statistics.mean(int(torch.isin(support, top).sum()) for support in supports)
        title = (
            f"original, {options.outer} of {ORIGINAL_OUTER} outer iterations" if side == "original" else "sparse_hf"
        )
        print(f"| {title} | {seconds[side]:.2f} | {shared(supports)} | {top_shared:.1f} |")
    print(f"\nas run, the original takes {seconds['original'] / seconds['ours']:.1f} times as long")
    if options.outer < ORIGINAL_OUTER:
        whole = seconds["original"] * ORIGINAL_OUTER / options.outer
        ratio = whole / seconds["ours"]
        print(f"scaled in proportion to {ORIGINAL_OUTER} (too low): {whole:.0f} s, {ratio:.0f} times as long")


if __name__ == "__main__":
    main()
