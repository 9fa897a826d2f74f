"""The table of docs/results/lottery_tickets.md: every row by the recipe, every seed kept.

    python benchmarks/lottery_ticket_results.py --model_name_or_path MODEL --glue GLUE_FOLDER --output_dir OUT

GLUE_FOLDER holds the tasks in GLUE's own layouts (SST-2/, CoLA/, MRPC/, RTE/, STS-B/). Phases: searches of all tasks
and seeds; then the controls at the highest sparsity at which the mean of the ticket is within one standard deviation
of dense; then the transfer matrix of four tasks. A run whose result is on disk is not repeated, so the command can be
stopped and repeated, and several may run at once: each takes the next run that no other holds. Exact commands are
kept beside its result. `--report` prints the tables in Markdown and runs nothing.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from recipe_runs import cell, finished, print_commands, run_once, run_recipe


RECIPE = Path(__file__).parents[1] / "recipes" / "lottery_ticket_glue.py"
ROUNDS, FINAL = 3, 0.6
SEEDS = (0, 1, 2)
CONTROLS = ("one_shot", "random", "reinit")


class Task(NamedTuple):
    """Where a task is and how it is trained: training rows are a stated subset, sized for a CPU."""

    folder: str
    train: str
    validation: str
    metric: str
    rows: int
    epochs: int
    learning_rate: str


# Rates and lengths by which the dense model learns the task; RTE is not learnt from this model at any we tried.
TASKS = {
    "sst2": Task("SST-2", "train.tsv.gz", "dev.tsv", "accuracy", 3000, 1, "2e-4"),
    "stsb": Task("STS-B", "sts-train.csv", "sts-dev.csv", "spearman", 2400, 1, "2e-4"),
    "mrpc": Task("MRPC", "train.tsv", "dev.tsv", "f1", 3668, 1, "1e-4"),
    "rte": Task("RTE", "train.tsv", "dev.tsv", "accuracy", 1000, 1, "1e-4"),
    "cola": Task("CoLA", "train.tsv", "dev.tsv", "matthews", 8551, 2, "1e-4"),
}
TRANSFER = ("sst2", "stsb", "mrpc", "cola")
SPARSITIES = [FINAL * number / ROUNDS for number in range(1, ROUNDS + 1)]


def command(options: argparse.Namespace, task: str, seed: int, mode: str, folder: Path, *more: str) -> list[str]:
    """Arguments of one run of the recipe."""
    place = TASKS[task]
    data = Path(options.glue) / place.folder
    return [
        *("--model_name_or_path", options.model_name_or_path, "--mode", mode, "--task_name", task),
        *("--train_file", str(data / place.train), "--validation_file", str(data / place.validation)),
        *("--max_train_samples", str(place.rows), "--max_length", "128", "--seed", str(seed)),
        *("--num_train_epochs", str(place.epochs), "--learning_rate", place.learning_rate),
        *("--per_device_train_batch_size", "16"),
        *("--per_device_eval_batch_size", "64", "--train_sampling_strategy", "group_by_length"),
        *("--eval_strategy", "epoch" if mode == "search" else "no"),
        *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "50"),
        *(("--exclude", *options.exclude) if options.exclude else ()),
        *("--output_dir", str(folder), *more),
    ]


def claim_and_run(options: argparse.Namespace, task: str, seed: int, mode: str, name: str, *more: str) -> bool:
    """Do one run unless its result is there or another process holds it; whether it was done now."""

    def run(folder: Path) -> dict:
        return do(task, mode, folder, command(options, task, seed, mode, folder, *more))

    return run_once(options.output_dir, name, run, keep_bytes=16 << 20)


def do(task: str, mode: str, folder: Path, arguments: list[str]) -> dict:
    """One run of the recipe; its record."""
    if mode == "search" and (folder / "search.json").is_file():
        arguments += ["--resume_from_checkpoint", "true"]
    run_recipe(RECIPE, arguments)
    metric = f"eval_{TASKS[task].metric}"
    value = json.loads((folder / "eval_results.json").read_text())[metric]
    record = {"metric": metric, "value": value, "command": " ".join(arguments)}
    if mode == "search":
        rounds = json.loads((folder / "search.json").read_text())["rounds"]
        record["curve"] = [one["metrics"][metric] for one in rounds] + [value]
    return record


def curves(options: argparse.Namespace, task: str) -> list[list[float]]:
    """Per seed: the metric at 0 zeros, then at each sparsity of the search. Empty until all seeds are there."""
    return [one["curve"] for one in finished(options.output_dir, [f"{task}-search-{seed}" for seed in SEEDS])]


def matching_round(options: argparse.Namespace, task: str) -> int:
    """The last round whose ticket's mean is within one standard deviation of dense; the first if none is."""
    seeds = curves(options, task)
    if len(seeds) < len(SEEDS):
        return 0
    dense = [curve[0] for curve in seeds]
    floor = statistics.mean(dense) - statistics.stdev(dense)
    fits = [r for r in range(1, ROUNDS + 1) if statistics.mean(curve[r] for curve in seeds) >= floor]
    return max(fits, default=1)


def ticket(options: argparse.Namespace, task: str, seed: int, round: int) -> str:
    """Folder of the ticket that a search drew at the end of a round."""
    return str(Path(options.output_dir) / f"{task}-search-{seed}" / f"round-{round}" / "ticket")


def jobs(options: argparse.Namespace) -> list[tuple]:
    """Everything that can run now, in order."""
    found = []
    for seed in SEEDS:
        for task in options.tasks:
            more = ("--sparsity", str(FINAL), "--rounds", str(ROUNDS), "--rewind_head", "true")
            found.append((task, seed, "search", f"{task}-search-{seed}", *more))
    rounds = {task: matching_round(options, task) for task in options.tasks}
    for seed in SEEDS:
        for task, round in rounds.items():
            for mode in CONTROLS if round else ():
                more = ("--sparsity", str(SPARSITIES[round - 1]))
                more += ("--ticket", ticket(options, task, seed, round)) if mode == "reinit" else ()
                found.append((task, seed, mode, f"{task}-{mode}-{seed}", *more))
    for seed in SEEDS:
        transfer = [task for task in TRANSFER if task in options.tasks]
        for source in transfer if all(rounds[task] for task in transfer) else ():
            for target in transfer:
                if source != target:
                    # Equal sparsity everywhere, so that only the task of the ticket differs.
                    more = ("--ticket", ticket(options, source, seed, options.transfer_round))
                    found.append((target, seed, "ticket", f"transfer-{source}-{target}-{seed}", *more))
    return found


def work(options: argparse.Namespace) -> None:
    """Do what is left, run by run; wait where another process's results decide what comes next."""
    while True:
        if any(claim_and_run(options, *job) for job in jobs(options)):
            continue
        if all(matching_round(options, task) for task in options.tasks):
            return
        time.sleep(5)


def results(options: argparse.Namespace, pattern: str) -> list[float]:
    """Values of the finished runs of all seeds."""
    return [one["value"] for one in finished(options.output_dir, [pattern.format(seed=seed) for seed in SEEDS])]


def report(options: argparse.Namespace) -> None:
    """Print all tables."""
    print("| task (metric, training rows) | dense | " + " | ".join(f"ticket {s:.0%}" for s in SPARSITIES) + " |")
    print("| --- |" + " --- |" * (ROUNDS + 1))
    for task in options.tasks:
        place, seeds = TASKS[task], curves(options, task)
        print(
            f"| {task} ({place.metric}, {place.rows}) | "
            + " | ".join(cell([c[r] for c in seeds]) for r in range(ROUNDS + 1))
            + " |"
        )
    print("\n| task | sparsity | dense | ticket (IMP) | one-shot | random | re-initialised |\n|" + " --- |" * 7)
    for task in options.tasks:
        round, seeds = matching_round(options, task), curves(options, task)
        if round:
            own = [cell([c[0] for c in seeds]), cell([c[round] for c in seeds])]
            own += [cell(results(options, f"{task}-{mode}-{{seed}}")) for mode in CONTROLS]
            print(f"| {task} | {SPARSITIES[round - 1]:.0%} | " + " | ".join(own) + " |")
    sparsity = SPARSITIES[options.transfer_round - 1]
    print(f"\nTransfer at {sparsity:.0%} zeros: rows are the ticket's task, columns the task trained on.\n")
    transfer = [task for task in TRANSFER if task in options.tasks]
    print("| ticket from | " + " | ".join(transfer) + " |\n|" + " --- |" * (len(transfer) + 1))
    for source in transfer:
        cells = []
        for target in transfer:
            own = [curve[options.transfer_round] for curve in curves(options, target)]
            pattern = f"transfer-{source}-{target}-{{seed}}"
            cells.append(cell(own if source == target else results(options, pattern)))
        print(f"| {source} | " + " | ".join(cells) + " |")
    print_commands(options.output_dir, RECIPE)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--glue", default="")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--exclude", nargs="*", help="patterns of matrices to leave dense in every row")
    parser.add_argument("--transfer_round", type=int, default=2)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    report(options) if options.report else work(options)


if __name__ == "__main__":
    main()
