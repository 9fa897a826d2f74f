"""The table of docs/results/moe.md: an upcycled model on mixed domains, with and without ways to balance its experts.

    python benchmarks/moe_balance_results.py --model_name_or_path LLAMA --domains stories=... code=... --output_dir OUT

The dense model becomes a Mixtral (softmax routers) and a GLM-4-MoE (sigmoid routers with a selection bias), eight
experts each, top 2. Every arm trains on the same blocks in the same order, four micro-batches to a step. Losses are of
held-out blocks, the language model's alone. A run whose result is on disk is not repeated; several processes may run
at once. `--report` prints the tables in Markdown and runs nothing.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from recipe_runs import cell, finished, run_once
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from sparse_hf import BalanceConfig, SparseTrainer, expert_usage, upcycle
from sparse_hf.algorithms.expert_load import expert_load, variation_by_chance


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from upcycle_lm import Arguments, Blocks, batches, blocks_of, losses, read_texts


SEEDS = (0, 1, 2)
EXPERTS, TOP_K, COEFFICIENT = 8, 2, 0.01
MICRO_BATCH, ACCUMULATION = 4, 4


class Arm(NamedTuple):
    """One way to train: the mixture's model type and what balances it; None is the stock Trainer with its own loss."""

    target: str
    balance: BalanceConfig | None


ARMS = {
    "no loss": Arm("mixtral", BalanceConfig(0.0)),
    "stock, pooled over layers": Arm("mixtral", None),
    "per layer, routers": Arm("mixtral", BalanceConfig(COEFFICIENT)),
    "per layer, network": Arm("mixtral", BalanceConfig(COEFFICIENT, gradient="network")),
    "sigmoid, no loss": Arm("glm4_moe", BalanceConfig(0.0)),
    "sigmoid, per layer, routers": Arm("glm4_moe", BalanceConfig(COEFFICIENT)),
    "sigmoid, bias alone": Arm("glm4_moe", BalanceConfig(0.0, bias_rate=0.001)),
}


def read_blocks(options: argparse.Namespace) -> tuple[dict[str, Blocks], Blocks]:
    """Held-out blocks by domain, and those to train on."""
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    arguments = Arguments(options.model_name_or_path, options.domains, block_size=128, blocks=1000, held_out=32)
    named = (one.partition("=") for one in options.domains)
    blocks = {name: blocks_of(read_texts(file), tokenizer, arguments) for name, _, file in named}
    held_out = {name: one[: arguments.held_out] for name, one in blocks.items()}
    return held_out, [block for one in blocks.values() for block in one[arguments.held_out :]]


def train(options: argparse.Namespace, arm: Arm, seed: int, folder: Path) -> dict:
    """Upcycle, train and measure; the record."""
    held_out, data = read_blocks(options)
    upcycle(options.model_name_or_path, folder / "start", EXPERTS, TOP_K, target=arm.target, seed=seed, progress=False)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    args = TrainingArguments(
        str(folder),
        max_steps=options.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    parts = {"model": model, "args": args, "train_dataset": data, "data_collator": default_data_collator}
    if arm.balance is not None:
        SparseTrainer(**parts, balance=arm.balance).train()
    else:
        # As much pressure on each layer as ours, before accumulation multiplies it.
        layers = model.config.num_hidden_layers
        model.router_aux_loss_coef = COEFFICIENT * layers / TOP_K
        model.config.output_router_logits = True
        Trainer(**parts).train()
        model.config.output_router_logits = False
    return measure(model.eval(), held_out)


def measure(model: torch.nn.Module, held_out: dict[str, Blocks]) -> dict:
    """Held-out loss and, per layer over all domains, how even the load is."""
    found = losses(model, held_out)
    everything = [block for blocks in held_out.values() for block in blocks]
    counts = torch.stack(list(expert_usage(model, batches(everything, model)).counts.values()))
    load = expert_load(counts)
    tokens = int(counts[0].sum()) // TOP_K
    return {
        "value": found["mean"],
        "losses": found,
        "max_violation": load.max_violation.tolist(),
        "variation": load.variation.tolist(),
        "dead": load.dead.sum().item(),
        "chance": variation_by_chance(EXPERTS, TOP_K, tokens),
    }


def report(output_dir: str) -> None:
    """Print the table."""
    titles = ("arm", "held-out loss", "MaxVio, mean of layers", "worst layer", "dead experts", "by layer, seed 0")
    print(f"| {' | '.join(titles)} |")
    print("| --- |" + " --- |" * 5)
    for name in ARMS:
        runs = finished(output_dir, [folder_of(name, seed) for seed in SEEDS])
        if not runs:
            continue
        cells = [cell([run["value"] for run in runs], 1, 3)]
        cells += [cell([statistics.mean(run["max_violation"]) for run in runs], 1, 2)]
        cells += [cell([max(run["max_violation"]) for run in runs], 1, 2)]
        cells += [" / ".join(f"{run['dead']:.0f}" for run in runs)]
        cells += [" ".join(f"{one:.2f}" for one in runs[0]["max_violation"])]
        print(f"| {name} | " + " | ".join(cells) + " |")
        chance = runs[0]["chance"]
    print(f"\nNoise floor of the coefficient of variation at this many tokens: {chance:.3f}")


def folder_of(name: str, seed: int) -> str:
    """Name of a run's folder."""
    return f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="", help="a small dense Llama")
    parser.add_argument("--domains", nargs="+", default=[], help="name=FILE of each, as for recipes/upcycle_lm.py")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    for seed in () if options.report else SEEDS:
        for name in options.arms:
            run_once(
                options.output_dir,
                folder_of(name, seed),
                lambda folder, arm=ARMS[name], seed=seed: train(options, arm, seed, folder),
                keep_bytes=0,
            )
    report(options.output_dir)


if __name__ == "__main__":
    main()
