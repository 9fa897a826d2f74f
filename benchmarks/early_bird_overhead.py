"""What do coefficients on heads and neurons, their L1 penalty and the detector's looks cost in a training step?

    python benchmarks/early_bird_overhead.py [--layers 12 --hidden 768 --batch 8 --length 128 --rounds 7]

One process, one thread, one model size (BERT-base by default), fused AdamW, clipping at 1.0, dropout as configured.
The sides take turns; figures are medians of CPU seconds of the process, which a busy machine disturbs less than wall
time. The added work is also timed by itself inside its steps: whole steps vary by more than it costs. A look at the
mask is spread over the `--look_every` steps between two, by default 0.05 of an epoch of MRPC (3,668 pairs, batches of
8).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerControl

from sparse_hf.tickets import coefficients as coefficients_module
from sparse_hf.tickets.coefficients import UnitCoefficients
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.training.early_bird_detector import EarlyBirdDetector


class Stopwatch:
    """CPU seconds spent in some functions since the last `reset`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable) -> Callable:
        """`function`, with its time added here."""

        def run(*args: object) -> object:
            start = time.process_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.process_time() - start

        return run


class Side:
    """A model, its optimizer, and how its units are scaled: not, by sparse_hf, or by autograd's own multiplication."""

    def __init__(self, options: argparse.Namespace, how: str) -> None:
        self.how, self.watch = how, Stopwatch()
        self.model = build(options)
        weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
        self.coefficients = None
        if how == "plain":
            return
        original = coefficients_module._multiplier
        make = original if how == "sparse_hf" else by_autograd
        coefficients_module._multiplier = lambda value, width: self.watch.timed(make(value, width))
        self.coefficients = UnitCoefficients.attach(self.model)
        coefficients_module._multiplier = original
        self.optimizer.add_param_group({"params": list(self.coefficients.parameters()), "weight_decay": 0.0})
        add = self.watch.timed(self.coefficients.add_l1_gradient)
        self.optimizer.register_step_pre_hook(lambda *_: add(1e-4))

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """CPU seconds of one training step."""
        self.watch.seconds, start = 0.0, time.process_time()
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def by_autograd(value: nn.Parameter, width: int) -> Callable:
    """The hook as it would be without a gradient of its own."""

    def multiply(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return ((args[0] * value.repeat_interleave(width)).to(args[0].dtype), *args[1:])

    return multiply


def build(options: argparse.Namespace) -> BertForSequenceClassification:
    """A random BERT of the asked size; the same for every side."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    heads = max(1, options.hidden // 64)
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=options.layers, num_attention_heads=heads, vocab_size=30522, **sizes)
    )


def seconds_of_looks(coefficients: UnitCoefficients, looks: int) -> list[float]:
    """CPU seconds of each look of the detector, its distances to the last masks included."""
    detector = EarlyBirdDetector(coefficients, EarlyBirdConfig(check_every=1, longest=looks + 1), steps_per_epoch=1)
    taken = []
    for number in range(1, looks + 1):
        with torch.no_grad():
            for value in coefficients.values:
                value.add_(torch.randn_like(value), alpha=1e-3)
        start = time.process_time()
        state = SimpleNamespace(global_step=number, max_steps=looks + 1)
        detector.on_step_end(None, state, TrainerControl())
        taken.append(time.process_time() - start)
    return taken


def measure(options: argparse.Namespace, sides: list[Side]) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every step of every side, and the shares of the added work in sparse_hf's steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (options.batch, options.length), generator=generator)
    batch = {"input_ids": ids, "labels": torch.zeros(options.batch, dtype=torch.long)}
    seconds: dict[str, list[float]] = {side.how: [] for side in sides}
    shares = []
    for round in range(-2, options.rounds):  # two rounds of warm-up
        for side in sides if round % 2 else sides[::-1]:
            taken = side.step(batch)
            if round >= 0:
                seconds[side.how].append(taken)
                if side.how == "sparse_hf":
                    shares.append(side.watch.seconds / (taken - side.watch.seconds))
    return seconds, shares


def main() -> None:
    """Measure all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 12, "hidden": 768, "batch": 8, "length": 128, "rounds": 7, "look_every": 23}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = [Side(options, how) for how in ("plain", "sparse_hf", "autograd's own")]
    # Autograd calls this by name, on whichever side it is; only sparse_hf's has it.
    scale = coefficients_module._Scale
    scale.backward = staticmethod(sides[1].watch.timed(scale.backward))
    seconds, shares = measure(options, sides)
    plain = statistics.median(seconds["plain"])
    look = statistics.median(seconds_of_looks(sides[1].coefficients, max(7, options.rounds)))
    spread = look / options.look_every / plain
    units = sum(one.count for one in sides[1].coefficients.units)
    print(
        f"{units:,} coefficients, 1 thread, median of {options.rounds} steps of {options.batch} x {options.length}\n"
    )
    print("| side | step, CPU s | lowest to highest | ratio to plain |\n| --- | --- | --- | --- |")
    for how, values in seconds.items():
        middle = statistics.median(values)
        print(f"| {how} | {middle:.3f} | {min(values):.3f} to {max(values):.3f} | {middle / plain:.3f} |")
    whole = statistics.median(seconds["sparse_hf"]) / plain - 1 + spread
    print(f"\none look at the mask: {1000 * look:.0f} ms, once in {options.look_every} steps: {spread:.2%} of a step")
    print(f"overhead by whole steps, looks included: {whole:.2%}")
    print(f"the added work by itself, looks included: {statistics.median(shares) + spread:.2%} of a step")


if __name__ == "__main__":
    main()
