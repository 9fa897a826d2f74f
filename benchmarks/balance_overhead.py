"""What do load balancing and its metrics cost in a training step of a mixture of experts?

    OMP_NUM_THREADS=1 python benchmarks/balance_overhead.py [--hidden 256 --layers 4 --rounds 3 --steps 6]

A random Mixtral and a random GLM-4 MoE (which has the bias of the choice), with 8 and with 64 experts, top 2, trained
by `SparseTrainer` without balancing and with each kind of it, in turns; `grouped_mm`, AdamW, fp32, no accumulation.
The first step of each training is left out. Of each round the medians are compared, and the median of these ratios is
shown. Beside it what the balancer itself runs in a step as a part of that step; the backward pass through its losses,
with `gradient="network"`, is not in it. `--clock cpu` counts seconds of this process on a core, so that it may be used
where other processes run, where the part is to be trusted more than the ratio; `wall` is for quiet machines.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sparse_hf import BalanceConfig, SparseTrainer


MEASURED = {"no balance": None, "measured only": BalanceConfig(coefficient=0.0)}
EVERY = {"z": 0.001, "sequence": 0.01, "device": 0.01, "device_groups": 2, "entropy": 0.001}
KINDS = {
    "mixtral": {
        **MEASURED,
        'gradient="routers"': BalanceConfig(),
        'gradient="network"': BalanceConfig(gradient="network"),
        'every loss, "routers"': BalanceConfig(**EVERY),
        'every loss, "network"': BalanceConfig(**EVERY, gradient="network"),
        "float32_routers": BalanceConfig(float32_routers=True),
    },
    "glm4_moe": {
        **MEASURED,
        "bias alone": BalanceConfig(coefficient=0.0, bias_rate=0.001),
        'bias and "routers"': BalanceConfig(bias_rate=0.001),
    },
}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Clock(TrainerCallback):
    """Seconds of each step, and those of them in functions that are watched."""

    def __init__(self, clock: str) -> None:
        self.seconds: list[float] = []
        self.watched: list[float] = []
        self.now = CLOCKS[clock]

    def on_step_begin(self, *arguments: object, **others: object) -> None:
        """Start."""
        self.start = self.now()
        self.watched.append(0.0)

    def on_step_end(self, *arguments: object, **others: object) -> None:
        """Stop."""
        self.seconds.append(self.now() - self.start)

    def watch(self, owner: object, name: str) -> None:
        """Count the seconds of a method too."""
        method = getattr(owner, name)

        def timed(*arguments: object, **others: object) -> object:
            start = self.now()
            result = method(*arguments, **others)
            self.watched[-1] += self.now() - start
            return result

        setattr(owner, name, timed)

    def medians(self) -> tuple[float, float]:
        """Of all steps but the first: seconds, and the part of the watched functions."""
        parts = [own / whole for own, whole in zip(self.watched, self.seconds, strict=True)]
        return statistics.median(self.seconds[1:]), statistics.median(parts[1:])


def random_model(family: str, experts: int, options: argparse.Namespace) -> PreTrainedModel:
    """Of a family of `KINDS`; all FFNs are mixtures of as large experts."""
    sizes = dict(
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        num_experts_per_tok=2,
        num_local_experts=experts,
    )
    if family == "glm4_moe":
        sizes |= dict(moe_intermediate_size=2 * options.hidden, n_routed_experts=experts, first_k_dense_replace=0)
        sizes |= dict(head_dim=options.hidden // 8, pad_token_id=0)
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")


def train(model: PreTrainedModel, balance: BalanceConfig | None, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, and the balancer's part."""
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
        clock = Clock(options.clock)
        parts = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
        trainer = SparseTrainer(model, args, **parts, balance=balance)
        if balance is not None:
            for name in ("_read", "_term", "on_optimizer_step"):
                clock.watch(trainer._load_balancer, name)
        trainer.train()
    return clock.medians()


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
    parser.add_argument("--families", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--only", nargs="+", help="kinds of balancing, by their names in the table; default: all")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    options = parser.parse_args()
    print("| family | experts | balance | seconds per step | of none | balancer's part |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family, experts in itertools.product(options.families, options.experts):
        model = random_model(family, experts, options)
        kinds = {name: one for name, one in KINDS[family].items() if one is None or name in (options.only or [name])}
        rounds = [
            {name: train(model, balance, options) for name, balance in kinds.items()} for _ in range(options.rounds)
        ]
        for name in kinds:
            seconds = statistics.median(one[name][0] for one in rounds)
            ratio = statistics.median(one[name][0] / one["no balance"][0] for one in rounds)
            part = statistics.median(one[name][1] for one in rounds)
            print(f"| {family} | {experts} | {name} | {seconds:.3f} | {ratio:.3f} | {part:.2%} |", flush=True)


if __name__ == "__main__":
    main()
