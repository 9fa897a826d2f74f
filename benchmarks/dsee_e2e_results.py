"""The E2E table of docs/results/dsee.md: DSEE, LoRA and full fine-tuning of a small causal model, every seed kept.

    python benchmarks/dsee_e2e_results.py --model_name_or_path MODEL --e2e E2E_FOLDER --output_dir OUT

`recipes/dsee_gpt2.py` with its protocol but for what `SIZE` says. Full fine-tuning and LoRA have the best of two
learning rates by the validation loss of a seed that the table does not show; DSEE has LoRA's. Restartable; several
processes may run at once. E2E_FOLDER holds trainset.csv.gz, devset.csv.gz and testset_w_refs.csv.gz. `--report` prints
the table. Sized for a Llama of 260,032 parameters with 512 tokens, such as stories260K.
"""

import argparse
import csv
import gzip
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipe_runs import cell, finished, print_commands, run_once, run_recipe


RECIPE = Path(__file__).parents[1] / "recipes" / "dsee_gpt2.py"
SEEDS, RATE_SEED = (0, 1, 2), 9
SIZE = ("--max_train_samples", "3200", "--max_test_contexts", "30", "--num_train_epochs", "1", "--warmup_steps", "20")
SIZE += ("--per_device_train_batch_size", "16", "--longest_text", "220", "--repeated", "12")  # tokens are short
# Rank 8 has 9,248 numbers in the seven matrices of a layer; rank 7 has 8,092, and 165 entries of S2 each make 9,247.
TUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DSEE = ("--method", "dsee", "--r", "7", "--nnz", "165", "--target_modules", *TUNED)
METHODS = {
    "full": ("--method", "full"),
    "lora": ("--method", "lora", "--r", "8", "--target_modules", *TUNED),
    "dsee": DSEE,
    "dsee-30": (*DSEE, "--base_sparsity", "0.3"),
}
RATES = {"full": ("5e-4", "2e-3"), "lora": ("2e-3", "1e-2")}
VALIDATION_ROWS = 500
SCORES = ("bleu", "nist", "rouge_l", "cider")


class Run(NamedTuple):
    """One training."""

    method: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.rate}-{self.seed}"


def validation_rows(options: argparse.Namespace) -> Path:
    """The first rows of the development set, as a file."""
    path = Path(options.output_dir) / "devset.csv"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(Path(options.e2e) / "devset.csv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = list(itertools.islice(csv.reader(file), VALIDATION_ROWS + 1))
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    return path


def best_rate(options: argparse.Namespace, method: str) -> str | None:
    """By validation loss; None while results are missing. DSEE takes LoRA's."""
    kind = "full" if method == "full" else "lora"
    names = {rate: Run(kind, rate, RATE_SEED).name for rate in RATES[kind]}
    found = {rate: one["loss"] for rate, name in names.items() for one in finished(options.output_dir, [name])}
    return min(found, key=found.get) if len(found) == len(names) else None


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Everything that can run now, in order."""
    for kind, rates in RATES.items():
        yield from (Run(kind, rate, RATE_SEED) for rate in rates)
    for seed in SEEDS:
        yield from (Run(one, rate, seed) for one in METHODS if (rate := best_rate(options, one)))


def do(options: argparse.Namespace, run: Run, folder: Path) -> dict:
    """One run of the recipe; its record."""
    data = Path(options.e2e)
    arguments = [
        *("--model_name_or_path", options.model_name_or_path, *METHODS[run.method], *SIZE),
        *("--train_file", str(data / "trainset.csv.gz"), "--validation_file", str(validation_rows(options))),
        *("--test_file", str(data / "testset_w_refs.csv.gz"), "--learning_rate", run.rate, "--seed", str(run.seed)),
        *("--per_device_eval_batch_size", "64", "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "true", "--output_dir", str(folder)),
    ]
    run_recipe(RECIPE, arguments)
    metrics = json.loads((folder / "eval_results.json").read_text())
    kept = {name: metrics.get(name) for name in ("trained_parameters", "base_sparsity", *SCORES)}
    return {"value": metrics["bleu"], "loss": metrics["eval_loss"], "command": " ".join(arguments), **kept}


def report(options: argparse.Namespace) -> None:
    """Print the table."""
    print("| method | trained | rate | loss | BLEU | NIST | ROUGE-L | CIDEr |\n|" + " --- |" * 8)
    for method in METHODS:
        rate = best_rate(options, method)
        found = finished(options.output_dir, [Run(method, rate, seed).name for seed in SEEDS])
        if found:
            scales = {"loss": (1, 3), "bleu": (100, 1), "nist": (1, 2), "rouge_l": (100, 1), "cider": (1, 2)}
            cells = [cell([one[name] for one in found], *how) for name, how in scales.items()]
            print(f"| {method} | {found[0]['trained_parameters']:,} | {rate} | " + " | ".join(cells) + " |")
    print_commands(options.output_dir, RECIPE)


def work(options: argparse.Namespace) -> None:
    """What is left, run by run."""
    while True:
        if any(claim_and_run(options, one) for one in runs(options)):
            continue
        if all(best_rate(options, one) for one in METHODS):
            return
        time.sleep(5)


def claim_and_run(options: argparse.Namespace, run: Run) -> bool:
    """Do a run unless its result is there or another process holds it; whether it was done now."""
    return run_once(options.output_dir, run.name, lambda folder: do(options, run, folder), keep_bytes=0)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--e2e", default="")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    report(options) if options.report else work(options)


if __name__ == "__main__":
    main()
