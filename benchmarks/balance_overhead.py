"""What do the balance loss and its metrics cost in a training step of a mixture of experts?

    OMP_NUM_THREADS=1 python benchmarks/balance_overhead.py [--hidden 256 --layers 4 --rounds 3 --steps 6]

A random Mixtral with 8 and with 64 experts, top 2, trained by `SparseTrainer` without a balance loss and with each
kind of `BalanceConfig`, in turns; `grouped_mm`, AdamW, fp32, no accumulation. Medians of steps; the first of each
training is left out.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback, TrainingArguments, default_data_collator

from sparse_hf import BalanceConfig, SparseTrainer


KINDS = {
    "no balance": None,
    "measured only": BalanceConfig(coefficient=0.0),
    'gradient="routers"': BalanceConfig(),
    'gradient="network"': BalanceConfig(gradient="network"),
}


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: object, **others: object) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_step_end(self, *arguments: object, **others: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


def train(model: MixtralForCausalLM, balance: BalanceConfig | None, options: argparse.Namespace) -> list[float]:
    """Seconds of the steps but the first."""
    ids = torch.randint(1000, (options.steps * options.batch_size, options.length)).tolist()
    with tempfile.TemporaryDirectory() as place:
        args = TrainingArguments(
            place,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=options.steps,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        clock = Clock()
        parts = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
        SparseTrainer(model, args, **parts, balance=balance).train()
    return clock.seconds[1:]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    options = parser.parse_args()
    print("| experts | balance | seconds per step | of none |\n| --- | --- | --- | --- |")
    for experts in options.experts:
        config = MixtralConfig(
            hidden_size=options.hidden,
            intermediate_size=2 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=1000,
            num_local_experts=experts,
        )
        model = MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")
        seconds: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(options.rounds):
            for name, balance in KINDS.items():
                seconds[name] += train(model, balance, options)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        for name, median in medians.items():
            print(f"| {experts} | {name} | {median:.3f} | {median / medians['no balance']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
