"""The tables of docs/results/dsee.md: every row by the recipe, every seed kept.

    python benchmarks/dsee_results.py --model_name_or_path MODEL --glue GLUE_FOLDER --output_dir OUT

DSEE, LoRA, SHiRA and full fine-tuning of an encoder, the first three with equally many trained numbers in the query
and value matrices; S1 at 0, 30 and 50 %; then where S2's entries lie. Each method has its own learning rate, the best
of `RATES` on a seed that no table shows. A run whose result is on disk is not repeated; several processes may run at
once. `--report` prints the tables in Markdown and runs nothing.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipe_runs import cell, finished, print_commands, run_once, run_recipe


RECIPE = Path(__file__).parents[1] / "recipes" / "dsee_glue.py"
SEEDS = (0, 1, 2)
RATE_SEED = 9
RATES = {"full": ("1e-4", "2e-4"), "adapter": ("5e-4", "2e-3")}
LOWER_RATES = {"stsb": ("1e-4",)}  # of adapters, where low-rank ones learn at neither of the others


class Task(NamedTuple):
    """Where a task is and how it is trained: training rows are a stated subset, sized for a CPU."""

    folder: str
    train: str
    validation: str
    metric: str
    rows: int
    epochs: int


TASKS = {
    "sst2": Task("SST-2", "train.tsv.gz", "dev.tsv", "accuracy", 2000, 2),
    "stsb": Task("STS-B", "sts-train.csv", "sts-dev.csv", "spearman", 1200, 4),
    "mrpc": Task("MRPC", "train.tsv", "dev.tsv", "f1", 3668, 2),
}
# In a 384 x 384 matrix all have 6,144 numbers: U V of rank 8, rank 7 and 768 entries, 6,144 entries; and S2 alone.
DSEE = ("--method", "dsee", "--r", "7", "--nnz", "768")
METHODS = {
    "full": ("--method", "full"),
    "lora": ("--method", "lora", "--r", "8"),
    "shira": ("--method", "shira", "--r", "8"),
    "dsee": DSEE,
    "dsee-30": (*DSEE, "--base_sparsity", "0.3"),
    "dsee-50": (*DSEE, "--base_sparsity", "0.5"),
}
# S2 alone, where its place has to matter: with U V beside it four fifths of the numbers do not move.
SUPPORTS = ("magnitude", "random", "decomposition", "gradient", "rows", "columns")
ALONE = {f"s2-{one}": ("--method", "dsee", "--r", "0", "--nnz", "6144", "--support", one) for one in SUPPORTS}
MASKED = ("--masked_modules", "key", "dense")  # beside the tuned ones: all matrices of the encoder


class Run(NamedTuple):
    """One training."""

    task: str
    method: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}-{self.method}-{self.rate}-{self.seed}"


def rates_of(task: str, method: str) -> tuple[str, ...]:
    """What is tried; S1 and supports take the rate of DSEE without S1."""
    return RATES["full"] if method == "full" else (*LOWER_RATES.get(task, ()), *RATES["adapter"])


def best_rate(options: argparse.Namespace, task: str, method: str) -> str | None:
    """The rate with the best result on the seed kept for it; None while results are missing."""
    kind = "s2-random" if method in ALONE else "dsee" if method.startswith("dsee") else method
    found = {
        rate: one["value"]
        for rate in rates_of(task, kind)
        for one in finished(options.output_dir, [Run(task, kind, rate, RATE_SEED).name])
    }
    return max(found, key=found.get) if len(found) == len(rates_of(task, kind)) else None


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Everything that can run now, in order."""
    for task in options.tasks:
        for method in ("full", "lora", "shira", "dsee", *(() if options.methods_only else ("s2-random",))):
            yield from (Run(task, method, rate, RATE_SEED) for rate in rates_of(task, method))
    for seed in SEEDS:
        for task in options.tasks:
            for method in METHODS if options.methods_only else {**METHODS, **ALONE}:
                if rate := best_rate(options, task, method):
                    yield Run(task, method, rate, seed)


def command(options: argparse.Namespace, run: Run, folder: Path) -> list[str]:
    """Arguments of the recipe."""
    task, method = TASKS[run.task], {**METHODS, **ALONE}[run.method]
    data = Path(options.glue) / task.folder
    return [
        *("--model_name_or_path", options.model_name_or_path, "--task_name", run.task, *method, "--alpha", "16"),
        *(MASKED if "--base_sparsity" in method else ()),
        *("--train_file", str(data / task.train), "--validation_file", str(data / task.validation)),
        *("--max_train_samples", str(task.rows), "--max_length", "128", "--seeds", str(run.seed)),
        *("--num_train_epochs", str(task.epochs), "--learning_rate", run.rate, "--warmup_steps", "20"),
        *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"),
        *("--train_sampling_strategy", "group_by_length", "--eval_strategy", "no", "--save_strategy", "no"),
        *("--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "50", "--output_dir", str(folder)),
    ]


def do(options: argparse.Namespace, run: Run, folder: Path) -> dict:
    """One run of the recipe; its record."""
    arguments = command(options, run, folder)
    run_recipe(RECIPE, arguments)
    metrics = json.loads((folder / f"seed-{run.seed}" / "eval_results.json").read_text())
    kept = {name: metrics.get(name) for name in ("trained_parameters", "base_sparsity", "merged_sparsity")}
    return {"value": metrics[f"eval_{TASKS[run.task].metric}"], "command": " ".join(arguments), **kept}


def table(options: argparse.Namespace, methods: dict[str, tuple]) -> None:
    """One row per method, one column per task."""
    titles = [f"{task} ({TASKS[task].metric}, {TASKS[task].rows} rows)" for task in options.tasks]
    print("| method | trained | " + " | ".join(titles) + " |\n|" + " --- |" * (len(titles) + 2))
    for method in methods:
        cells, trained = [], "-"
        for task in options.tasks:
            rate = best_rate(options, task, method)
            found = finished(options.output_dir, [Run(task, method, rate, seed).name for seed in SEEDS])
            cells.append(f"{cell([one['value'] for one in found])} at {rate}")
            trained = f"{found[0]['trained_parameters']:,}" if found else trained
        print(f"| {method} | {trained} | " + " | ".join(cells) + " |")


def report(options: argparse.Namespace) -> None:
    """Print all tables."""
    table(options, METHODS)
    if not options.methods_only:
        print()
        table(options, ALONE)
    for task in options.tasks:
        rate = best_rate(options, task, "dsee-30")
        found = finished(
            options.output_dir, [Run(task, one, rate, s).name for one in ("dsee-30", "dsee-50") for s in SEEDS]
        )
        zeros = [(one["base_sparsity"], one["merged_sparsity"]) for one in found]
        print(f"\n{task}: zeros of the frozen and of the merged matrices {zeros}")
    print_commands(options.output_dir, RECIPE)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--glue", default="")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods_only", action="store_true", help="without the comparison of supports")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        report(options)
        return
    while any(
        run_once(options.output_dir, run.name, lambda folder, run=run: do(options, run, folder), keep_bytes=1 << 20)
        for run in runs(options)
    ):
        pass


if __name__ == "__main__":
    main()
