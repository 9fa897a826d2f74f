"""What does keeping pruned weights at zero cost in a training step, beside torch.nn.utils.prune and parametrize?

    python benchmarks/mask_upkeep.py [--layers 12 --hidden 768 --batch 8 --length 128 --sparsity 0.6 --rounds 5]

One process, one model size (BERT-base by default), fused AdamW, clipping at 1.0. The sides take turns; figures are
medians of CPU seconds of the process, which a busy machine disturbs less than wall time. The upkeep of sparse_hf is
also timed by itself inside its steps: whole steps vary by more than it costs. Masks of a side are counted in bytes
per weight.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from transformers import BertConfig, BertForSequenceClassification

from sparse_hf import find_sites, prune
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.training.mask_keeper import MaskKeeper


class Multiply(nn.Module):
    """The usual parametrization: the weight times a bool mask in every forward."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight."""
        return weight * self.mask


class Side:
    """A model, its optimizer, and how its zeros are kept."""

    def __init__(self, options: argparse.Namespace, masks: dict[str, torch.Tensor], how: str) -> None:
        self.how = how
        self.model = build(options)
        if how in ("torch prune", "parametrize"):
            for name, mask in masks.items():
                module = self.model.get_submodule(f"bert.{name.removesuffix('.weight')}")
                if how == "torch prune":
                    torch_prune.custom_from_mask(module, "weight", mask)
                else:
                    parametrize.register_parametrization(module, "weight", Multiply(mask))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.keeper, self.upkeep = None, 0.0
        if how == "sparse_hf":
            self.keeper = MaskKeeper(self.optimizer, named_canonical_parameters(self.model), masks)
            for name in ("mask_gradients", "mask_weights", "_mask_moments"):
                setattr(self.keeper, name, self._timed(getattr(self.keeper, name)))

    def _timed(self, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            function()
            self.upkeep += time.process_time() - start

        return run

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """CPU seconds of one training step."""
        self.upkeep, start = 0.0, time.process_time()
        self.model(**batch).loss.backward()
        if self.keeper is not None:
            self.keeper.mask_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def build(options: argparse.Namespace) -> BertForSequenceClassification:
    """A random BERT of the asked size; the same for every side."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    heads = max(1, options.hidden // 64)
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=options.layers, num_attention_heads=heads, vocab_size=30522, **sizes)
    )


def main() -> None:
    """Measure all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "hidden": 768, "batch": 8, "length": 128, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.6)
    options = parser.parse_args()
    masks = prune(build(options), options.sparsity).masks()
    weights = sum(mask.numel() for mask in masks.values())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (options.batch, options.length), generator=generator)
    batch = {"input_ids": ids, "labels": torch.zeros(options.batch, dtype=torch.long)}
    sides = [Side(options, masks, how) for how in ("dense", "sparse_hf", "torch prune", "parametrize")]
    seconds: dict[str, list[float]] = {side.how: [] for side in sides}
    shares = []
    for round in range(-2, options.rounds):  # two rounds of warm-up; moments are masked in the first
        for side in sides:
            taken = side.step(batch)
            if round >= 0:
                seconds[side.how].append(taken)
                if side.keeper is not None:
                    shares.append(side.upkeep / (taken - side.upkeep))
    dense = statistics.median(seconds["dense"])
    bytes_per_weight = {"dense": "0", "sparse_hf": "1", "torch prune": "4 + 4 for the product", "parametrize": "1 + 4"}
    print(f"{len(find_sites(sides[0].model))} matrices, {weights:,} weights, {options.sparsity:.0%} zeros")
    print(
        f"{torch.get_num_threads()} threads, median of {options.rounds} steps of {options.batch} x {options.length}\n"
    )
    print("| side | step, CPU s | ratio to dense | mask bytes per weight |\n| --- | --- | --- | --- |")
    for how, values in seconds.items():
        middle = statistics.median(values)
        print(f"| {how} | {middle:.2f} | {middle / dense:.3f} | {bytes_per_weight[how]} |")
    print(f"\nsparse_hf's upkeep by itself: {statistics.median(shares):.2%} of a step (gradients and weights)")
    parameters = named_canonical_parameters(sides[1].model)
    bits = {name: sign_extended(mask) for name, mask in masks.items()}
    moments = []
    for _ in range(options.rounds):
        start = time.process_time()
        for name in 2 * list(bits):  # as many bytes as both moments
            zero_pruned_(parameters[name].data, bits[name])
        moments.append(time.process_time() - start)
    print(f"masking both moments too, where a rule needs it: {statistics.median(moments) / dense:.2%} more")


if __name__ == "__main__":
    main()
