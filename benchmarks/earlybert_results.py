"""The table of docs/results/earlybert.md: every row by the recipe, every seed kept.

    python benchmarks/earlybert_results.py --model_name_or_path MODEL --glue GLUE_FOLDER --output_dir OUT

The paper's protocol: dense trains three epochs; a ticket is searched for at the same rate until its mask has settled,
then the smaller model trains two epochs at twice the rate. Controls train like the smaller model: random units in the
ticket's own shape, and units of the largest pretrained weights under the same budget. A run whose result is on disk is
not repeated; several processes may run at once. `--report` prints the tables in Markdown and runs nothing.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipe_runs import cell, finished, print_commands, run_once, run_recipe


RECIPE = Path(__file__).parents[1] / "recipes" / "earlybert_glue.py"
SEEDS = (0, 1, 2)
BUDGETS = {"third": ("0.3333", "0.4"), "half": ("0.5", "0.6")}  # fractions of heads and of neurons that are cut
MODES = ("search", "random", "magnitude")
DENSE_EPOCHS = "3"


class Task(NamedTuple):
    """Where a task is and how it is trained: training rows are a stated subset, sized for a CPU."""

    folder: str
    train: str
    validation: str
    metric: str
    rows: int
    learning_rate: float  # of the dense model and the search; the smaller model trains at twice that


TASKS = {
    "sst2": Task("SST-2", "train.tsv.gz", "dev.tsv", "accuracy", 2000, 1e-4),
    "stsb": Task("STS-B", "sts-train.csv", "sts-dev.csv", "spearman", 1200, 1e-4),
    "mrpc": Task("MRPC", "train.tsv", "dev.tsv", "accuracy", 1500, 1e-4),
}


class Run(NamedTuple):
    """One run of the recipe."""

    task: str
    budget: str  # empty for the dense model
    mode: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(filter(None, (self.task, self.budget, self.mode, str(self.seed))))


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Everything, in order: a random ticket needs the found one's shape."""
    for seed in options.seeds:
        for task in options.tasks:
            yield Run(task, "", "dense", seed)
            for budget in options.budgets:
                yield from (Run(task, budget, mode, seed) for mode in options.modes)


def command(options: argparse.Namespace, run: Run, folder: Path) -> list[str]:
    """Arguments of the recipe."""
    task = TASKS[run.task]
    data, dense = Path(options.glue) / task.folder, run.mode == "dense"
    arguments = [
        *("--model_name_or_path", options.model_name_or_path, "--mode", run.mode, "--task_name", run.task),
        *("--train_file", str(data / task.train), "--validation_file", str(data / task.validation)),
        *("--max_train_samples", str(options.rows or task.rows), "--max_length", "128", "--seed", str(run.seed)),
        *("--num_train_epochs", DENSE_EPOCHS if dense else str(options.slim_epochs)),
        *("--learning_rate", f"{task.learning_rate * (1 if dense else 2):g}"),
        *("--per_device_train_batch_size", str(options.batch_size), "--per_device_eval_batch_size", "64"),
        *(("--pad_to_max_length", "true") if options.pad else ()),
        *("--train_sampling_strategy", "group_by_length", "--eval_strategy", "no", "--save_strategy", "no"),
        *("--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "50", "--output_dir", str(folder)),
    ]
    if not dense:
        heads, neurons = BUDGETS[run.budget]
        arguments += ["--heads", heads, "--neurons", neurons]
    if run.mode == "search":
        arguments += ["--search_learning_rate", f"{task.learning_rate:g}"]
        arguments += [] if options.draw_at is None else ["--draw_at", options.draw_at]
    if run.mode == "random":
        arguments += ["--ticket", str(folder.parent / run._replace(mode="search").name / "ticket")]
    return arguments


def claim_and_do(options: argparse.Namespace, run: Run) -> bool:
    """Do a run unless its result is there, another process holds it, or what it needs is missing."""
    found = Path(options.output_dir) / run._replace(mode="search").name / "done.json"
    if run.mode == "random" and not found.is_file():
        return False
    return run_once(options.output_dir, run.name, lambda folder: do(options, run, folder), keep_bytes=1 << 20)


def do(options: argparse.Namespace, run: Run, folder: Path) -> dict:
    """One run of the recipe; its record."""
    arguments = command(options, run, folder)
    if (folder / "search.json").is_file():
        arguments += ["--resume_from_checkpoint", "true"]
    run_recipe(RECIPE, arguments)
    evaluation = json.loads((folder / "eval_results.json").read_text())
    record = {
        "value": evaluation[f"eval_{TASKS[run.task].metric}"],
        "parameters": evaluation["parameters"],
        "command": " ".join(arguments),
        "train": json.loads((folder / "train_results.json").read_text()),
    }
    if run.mode == "search":
        record["drawn"] = json.loads((folder / "search.json").read_text())["rounds"][0]
    return record


def records(options: argparse.Namespace, task: str, budget: str, mode: str) -> list[dict]:
    """The finished runs of all seeds."""
    return finished(options.output_dir, [Run(task, budget, mode, seed).name for seed in SEEDS])


def report(options: argparse.Namespace) -> None:
    """Print all tables."""
    print("| task (metric, rows) | cut | dense | early bird | random, same shape | magnitude |\n|" + " --- |" * 6)
    for task in options.tasks:
        dense = cell([one["value"] for one in records(options, task, "", "dense")])
        for budget in options.budgets:
            cells = [cell([one["value"] for one in records(options, task, budget, mode)]) for mode in MODES]
            heads, neurons = BUDGETS[budget]
            cut = f"{float(heads):.0%} heads, {float(neurons):.0%} neurons"
            place = TASKS[task]
            print(f"| {task} ({place.metric}, {place.rows}) | {cut} | {dense} | " + " | ".join(cells) + " |")
    print("\n| task | cut | drawn at step (of an epoch's) | parameters left | CPU time / dense |\n|" + " --- |" * 5)
    for task in options.tasks:
        dense = records(options, task, "", "dense")
        for budget in options.budgets:
            found = records(options, task, budget, "search")
            epoch = -(-(options.rows or TASKS[task].rows) // options.batch_size)
            steps = ", ".join(f"{one['drawn']['drawn_at']} ({one['drawn']['drawn_at'] / epoch:.2f})" for one in found)
            # Of whole commands: loading, the search, training and the evaluation at the end.
            ratios = [ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in zip(found, dense, strict=False)]
            sizes = ", ".join(f"{one['parameters'] / 1e6:.1f} M" for one in found)
            print(f"| {task} | {budget} | {steps} | {sizes} | {cell(ratios, 1, 2)} |")
    print_commands(options.output_dir, RECIPE)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--glue", default="")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--rows", type=int, help="other training rows than the tasks' own; takes a folder of its own")
    parser.add_argument("--batch_size", type=int, default=16, help="with another, take a folder of its own")
    parser.add_argument("--slim_epochs", type=float, default=2, help="with another number, take a folder of its own")
    parser.add_argument("--draw_at", help="draw there, not when the mask has settled; takes a folder of its own")
    parser.add_argument("--pad", action="store_true", help="all inputs to 128 tokens; takes a folder of its own")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        report(options)
        return
    while any(claim_and_do(options, run) for run in runs(options)):
        pass


if __name__ == "__main__":
    main()
