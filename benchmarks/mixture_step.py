"""How long does a training step of an upcycled model take, beside the dense one's, by Transformers' experts interface?

    OMP_NUM_THREADS=1 python benchmarks/mixture_step.py [--hidden 512 --layers 4 --rounds 9]

Mixtures that cost each token the dense FFN's FLOPs: one of eight copies, and eight of 64 parts of eight copies; and
two of eight copies, twice the FFN's FLOPs. Forward and backward of a causal language model, in fp32, in turns.
Medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparse_hf import ExpertInit, upcycle


MIXTURES = {
    "1 of 8 copies": (1, ExpertInit()),
    "8 of 64 parts": (8, ExpertInit(granularity=8)),
    "2 of 8 copies": (2, ExpertInit()),
}
# `batched_mm` copies the chosen experts for every token, which is for a few tokens at a time.
IMPLEMENTATIONS = ("eager", "grouped_mm")


def step(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds."""
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        vocab_size=1024,
    )
    ids = torch.randint(1024, (options.batch_size, options.length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        LlamaForCausalLM(config).save_pretrained(root / "dense")
        models = {"dense": AutoModelForCausalLM.from_pretrained(root / "dense")}
        for name, (top_k, init) in MIXTURES.items():
            upcycle(root / "dense", root / name, 8, top_k, init=init, check_tokens=0, progress=False)
            for one in IMPLEMENTATIONS:
                models[f"{name}, {one}"] = AutoModelForCausalLM.from_pretrained(
                    root / name, experts_implementation=one
                )
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.rounds + 1):
            for name, model in models.items():
                found = step(model, ids)
                if turn:  # the first warms up
                    seconds[name].append(found)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{options.batch_size} x {options.length} tokens, hidden {options.hidden}, {options.layers} layers\n")
    print("| model | seconds | of dense |\n| --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median / medians['dense']:.2f} |")


if __name__ == "__main__":
    main()
