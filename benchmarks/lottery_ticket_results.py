"""The table of docs/results/lottery_tickets.md: every row by the recipe, every seed kept.

    python benchmarks/lottery_ticket_results.py --model_name_or_path MODEL --glue GLUE_FOLDER --output_dir OUT

GLUE_FOLDER holds the tasks in GLUE's own layouts (SST-2/, CoLA/, MRPC/, RTE/, STS-B/). Phases: searches of all tasks
and seeds; then the controls at the highest sparsity at which the mean of the ticket is within one standard deviation
of dense; then the transfer matrix of four tasks. A run whose result is on disk is not repeated, so the command can be
stopped and repeated, and several may run at once: each takes the next run that no other holds. Exact commands are
kept beside its result. `--report` prints the tables in Markdown and runs nothing.
"""

import argparse
import contextlib
import fcntl
import gc
import io
import json
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple


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
    folder = Path(options.output_dir) / name
    if (folder / "done.json").is_file():
        return False
    locks = Path(options.output_dir) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not (folder / "done.json").is_file():
            run(options, task, seed, mode, name, *more)
        return True


def run(options: argparse.Namespace, task: str, seed: int, mode: str, name: str, *more: str) -> None:
    """One run of the recipe in this process."""
    folder = Path(options.output_dir) / name
    arguments = command(options, task, seed, mode, folder, *more)
    start = time.time()
    print(f"{name} ...", flush=True)
    if mode == "search" and (folder / "search.json").is_file():
        arguments += ["--resume_from_checkpoint", "true"]
    before, sys.argv = sys.argv, [str(RECIPE), *arguments]
    sys.path.insert(0, str(RECIPE.parent))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        sys.argv = before
    metric = f"eval_{TASKS[task].metric}"
    result = json.loads((folder / "eval_results.json").read_text())
    record = {
        "metric": metric,
        "value": result[metric],
        "command": " ".join(arguments),
        "seconds": time.time() - start,
    }
    if mode == "search":
        rounds = json.loads((folder / "search.json").read_text())["rounds"]
        record["curve"] = [one["metrics"][metric] for one in rounds] + [result[metric]]
    for large in folder.rglob("*.safetensors"):
        if large.stat().st_size > 16 << 20:
            large.unlink()  # weights are not needed again; tickets are
    (folder / "done.json").write_text(json.dumps(record, indent=2))
    print(f"{name}: {record['value']:.4f} in {record['seconds']:.0f} s", flush=True)
    gc.collect()


def curves(options: argparse.Namespace, task: str) -> list[list[float]]:
    """Per seed: the metric at 0 zeros, then at each sparsity of the search. Empty until all seeds are there."""
    files = [Path(options.output_dir) / f"{task}-search-{seed}" / "done.json" for seed in SEEDS]
    return [json.loads(file.read_text())["curve"] for file in files if file.is_file()]


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


def cell(values: list[float]) -> str:
    """Mean ± standard deviation and every seed, in percent."""
    if not values:
        return "not run"
    seeds = " / ".join(f"{100 * value:.1f}" for value in values)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({seeds})"


def results(options: argparse.Namespace, pattern: str) -> list[float]:
    """Values of the finished runs of all seeds."""
    files = [Path(options.output_dir) / pattern.format(seed=seed) / "done.json" for seed in SEEDS]
    return [json.loads(file.read_text())["value"] for file in files if file.is_file()]


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
    for file in sorted(Path(options.output_dir).glob("*-0/done.json")):
        print(
            f"\n{file.parent.name}: `python recipes/lottery_ticket_glue.py {json.loads(file.read_text())['command']}`"
        )


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
