"""What do masks cost in a step under DDP, FSDP2 and ZeRO, beside the same training without sparsity?

    python benchmarks/sharded_overhead.py [--hidden 512 --length 128 --steps 40 --strategies ddp fsdp2 zero2]

Two gloo processes on CPUs train a Llama (hidden 512, 4 layers: 12 M weights) twice in turns: dense, and under gradual
pruning whose masks change in every tenth step. Reported of the first rank, in its CPU seconds: the upkeep (hooks
around the optimizer's step, masking of gradients) and the change of masks, each timed by itself inside the sparse run,
as a share of a dense step; and whole steps, sparse by dense (medians), which scatter by more than the upkeep costs.
The bytes that ranks add up for one change of masks are measured by `memory_plan.py`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from transformers import TrainerCallback
from two_trainings import STRATEGIES, build, found_by_two, report, trainer_of

from sparse_hf import GradualPruningConfig, SparseTrainer


EVERY = 10
SKIPPED = 3  # first steps, in which memory is allocated


class Clock(TrainerCallback):
    """CPU seconds of whole steps, and of what is spent on masks inside of them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.spent = {"upkeep": [], "change": []}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        for parts in self.spent.values():
            parts.append(0.0)
        self._begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append(time.process_time() - self._begin)

    def timed(self, kind: str, function: Callable) -> Callable:
        """The function, whose CPU seconds count as `kind`."""

        def run(*arguments: object, **named: object) -> object:
            begin = time.process_time()
            result = function(*arguments, **named)
            self.spent[kind][-1] += time.process_time() - begin
            return result

        return run


def watch(trainer: SparseTrainer, clock: Clock) -> None:
    """Time the hooks of the mask keeper once it is there, and every change of masks."""
    callback = trainer._sparsity_callback
    callback.on_optimizer_step = clock.timed("change", callback.on_optimizer_step)

    class Attach(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            keeper = callback.keeper
            keeper._optimizer._optimizer_step_pre_hooks.clear()
            keeper._optimizer._optimizer_step_post_hooks.clear()
            keeper._optimizer.register_step_pre_hook(clock.timed("upkeep", keeper._before_step))
            keeper._optimizer.register_step_post_hook(clock.timed("upkeep", keeper._after_step))
            trainer._mask_gradients = clock.timed("upkeep", trainer._mask_gradients)

    trainer.add_callback(Attach())


def train(strategy: str, options: argparse.Namespace) -> None:
    """In one of two processes: dense and sparse in turns."""
    found = {"dense": [], "sparse": [], "upkeep": [], "change": []}
    for _ in range(options.rounds):
        for kind in ("dense", "sparse"):
            clock = Clock()
            sparse = GradualPruningConfig(sparsity=0.6, end_step=options.steps - 1, every=EVERY)
            with tempfile.TemporaryDirectory() as folder:
                shape = {"length": options.length, "max_steps": options.steps}
                model = build(options.hidden)
                trainer = trainer_of(folder, strategy, model, sparse if kind == "sparse" else None, **shape)
                if kind == "sparse":
                    watch(trainer, clock)
                trainer.add_callback(clock)
                trainer.train()
            found[kind] += clock.steps[SKIPPED:]
            if kind == "sparse":
                # A step whose masks do not change spends nothing worth counting on their change.
                changed = [number % EVERY == 0 for number in range(1, options.steps + 1)]
                pairs = list(zip(clock.spent["upkeep"], clock.spent["change"], changed, strict=True))[SKIPPED:]
                found["upkeep"] += [upkeep for upkeep, _, change in pairs if not change]
                found["change"] += [spent for _, spent, change in pairs if change]
    report(found)


def main() -> None:
    """Print shares of a dense step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        train(options.rank_of, options)
        return
    print("| strategy | dense step, CPU s | upkeep / dense step | a change of masks / dense step | whole steps |")
    print("| --- | --- | --- | --- | --- |")
    sizes = {name: str(vars(options)[name]) for name in ("hidden", "length", "steps", "rounds")}
    words = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    for strategy in options.strategies:
        found = found_by_two(__file__, "--rank-of", strategy, *words)
        dense, sparse, upkeep, change = (statistics.median(found[k]) for k in ("dense", "sparse", "upkeep", "change"))
        shares = f"{upkeep / dense:.2%} | {change / dense:.1%} | {sparse / dense:.3f}"
        print(f"| {strategy} | {dense:.3f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
