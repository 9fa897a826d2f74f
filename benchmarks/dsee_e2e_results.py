"""The E2E table of docs/results/dsee.md: a small GPT-2 from real text, then DSEE, LoRA and full fine-tuning of it.

    python benchmarks/dsee_e2e_results.py --tokenizer GPT2_TOKENIZER --texts stories.txt.gz wiki.txt.gz \
        --e2e E2E_FOLDER --output_dir OUT

The base (4 layers of width 128, GPT-2's tokenizer) is trained here from random weights by the stock Trainer, once over
TEXTS. Then `recipes/dsee_gpt2.py` with its protocol but for what `SIZE` says. Full fine-tuning and LoRA have the best
of two learning rates by the validation loss of a seed that the table does not show; DSEE has LoRA's. Restartable;
several processes may run at once. E2E_FOLDER holds trainset.csv.gz, devset.csv.gz and testset_w_refs.csv.gz.
`--report` prints the table.
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
BLOCK = 128  # tokens
SIZE = ("--max_train_samples", "1500", "--max_test_contexts", "50", "--num_train_epochs", "1", "--warmup_steps", "20")
SIZE += ("--per_device_train_batch_size", "16")
# In a 128 x 384 matrix: U V of rank 4 has 2,048 numbers, as rank 3 and 512 entries of S2 have.
DSEE = ("--method", "dsee", "--r", "3", "--nnz", "512")
METHODS = {
    "full": ("--method", "full"),
    "lora": ("--method", "lora", "--r", "4"),
    "dsee": DSEE,
    "dsee-30": (*DSEE, "--base_sparsity", "0.3", "--masked_modules", "c_proj", "c_fc"),
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


def train_base(options: argparse.Namespace, folder: Path) -> dict:
    """A GPT-2 of 4 layers, once over the texts."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    ids: list[int] = []
    for file in options.texts:
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as text:
            ids += [*tokenizer(text.read(), add_special_tokens=False, verbose=False)["input_ids"], 50256]
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, n_positions=512))
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=16, learning_rate=2e-3,
        warmup_steps=50, weight_decay=0.1, report_to="none", disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    result = trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(folder)
    return {
        "value": result.training_loss,
        "tokens": blocks.numel(),
        "parameters": model.num_parameters(),
        "last_losses": [one["loss"] for one in trainer.state.log_history if "loss" in one][-3:],
    }


def validation_rows(options: argparse.Namespace) -> Path:
    """The first rows of the development set, as a file."""
    path = Path(options.output_dir) / "devset.csv"
    if not path.is_file():
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
        *("--model_name_or_path", str(Path(options.output_dir) / "base"), *METHODS[run.method], *SIZE),
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
    (base,) = finished(options.output_dir, ["base"])
    print(f"base: {base['parameters']:,} parameters, {base['tokens']:,} tokens, last losses {base['last_losses']}\n")
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
    """The base, then what is left, run by run."""
    while not finished(options.output_dir, ["base"]):
        if not run_once(options.output_dir, "base", lambda folder: train_base(options, folder), keep_bytes=1 << 40):
            time.sleep(5)  # another process trains it
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
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--e2e", default="")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    report(options) if options.report else work(options)


if __name__ == "__main__":
    main()
