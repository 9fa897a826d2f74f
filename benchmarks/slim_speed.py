"""How fast is BERT with heads and neurons cut out, beside the FLOPs it is left with, and beside Torch-Pruning?

    pip install torch-pruning==1.6.1
    python benchmarks/slim_speed.py [--layers 12 --hidden 768 --batch 8 --length 128 --rounds 5]

One process, one thread, one model size (BERT-base by default). `--cuts 8x1840` keeps 8 heads and 1840 neurons in every
layer; 1843 is 60 % of 3072, 1840 the multiple of 16 below it. Both libraries rank units by the size of their weights
and cut the same BERT to the same counts; the time to cut includes both steps. Then inference of 1 and of `--batch`
examples (no gradients), forward and backward passes, and training steps (those, clipping at 1.0 and fused AdamW, which
updates the embeddings too) take turns on all models.
Figures are medians of CPU seconds of the process, which a busy machine disturbs less than wall time. FLOPs are those
of the matrix products in the layers: linear layers, attention scores and context vectors.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparse_hf import EarlyBirdConfig, StructuredTicket, slim


Batch = dict[str, torch.Tensor]


def build(options: argparse.Namespace) -> BertForSequenceClassification:
    """A random BERT of the asked size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    heads = max(1, options.hidden // 64)
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=options.layers, num_attention_heads=heads, vocab_size=30522, **sizes)
    )


def cut_by_sparse_hf(model: nn.Module, heads: int, neurons: int) -> nn.Module:
    """A new model with the units of the largest weights."""
    config = model.config
    cut = {"heads": 1 - heads / config.num_attention_heads, "neurons": 1 - neurons / config.intermediate_size}
    budget = EarlyBirdConfig(**cut, neuron_scope="layer", neuron_multiple=1)
    return slim(model, StructuredTicket.from_model(model, budget))


def cut_by_torch_pruning(model: nn.Module, heads: int, neurons: int) -> nn.Module:
    """The same `model`, cut in place by the dependency graph and the magnitude of its groups."""
    import torch_pruning

    layers, config = model.bert.encoder.layer, model.config
    attentions = [layer.attention.self for layer in layers]
    projections = [(one, linear) for one in attentions for linear in (one.query, one.key, one.value)]
    hidden = [linear for layer in layers for linear in (layer.attention.output.dense, layer.output.dense)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": torch.ones(1, 8, dtype=torch.long)},
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        # It rounds down what stays, so half a unit more is on the safe side.
        pruning_ratio=1 - (neurons + 0.5) / config.intermediate_size,
        head_pruning_ratio=max(0.0, 1 - (heads + 0.5) / config.num_attention_heads),
        num_heads={linear: one.num_attention_heads for one, linear in projections},
        in_channel_groups={},  # its default is one dict for all pruners, which keeps their models in memory
        out_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.bert.embeddings, model.bert.pooler, model.classifier, *hidden],
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    for one in attentions:  # which it leaves to its user
        one.num_attention_heads, one.all_head_size = pruner.num_heads[one.query], one.query.out_features
    return model


def torch_pruning_version() -> str | None:
    """None where it is not installed."""
    try:
        return version("torch-pruning")  # its own `__version__` lags behind
    except PackageNotFoundError:
        return None


def counts(model: nn.Module) -> set[tuple[int, int]]:
    """(heads, neurons) that occur in the layers, read off the weights."""
    return {
        (layer.attention.self.query.weight.shape[0] // layer.attention.self.attention_head_size, len(up.weight))
        for layer in model.bert.encoder.layer
        for up in [layer.intermediate.dense]
    }


def flops(model: nn.Module, batch: int, length: int) -> int:
    """Of the matrix products in the layers of one forward pass; a training step has three times as many."""
    linear = sum(one.weight.numel() for one in model.bert.encoder.modules() if isinstance(one, nn.Linear))
    width = sum(layer.attention.self.query.weight.shape[0] for layer in model.bert.encoder.layer)
    return 2 * batch * length * linear + 2 * 2 * batch * length * length * width


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def cut_all(options: argparse.Namespace, cutters: dict[str, Callable]) -> dict[str, nn.Module]:
    """Cut with every library to every count, and print what that took."""
    dense, models = build(options).eval(), {}
    print("| heads x neurons | library | seconds to cut | parameters |\n| --- | --- | --- | --- |")
    for cut in options.cuts:
        heads, neurons = map(int, cut.split("x"))
        for library, cutter in cutters.items():
            taken = []
            try:
                for _ in range(3):
                    whole = copy.deepcopy(dense)
                    seconds, smaller = timed(lambda: cutter(whole, heads, neurons))  # noqa: B023
                    taken.append(seconds)
                if counts(smaller) != {(heads, neurons)}:
                    raise ValueError(f"it kept {sorted(counts(smaller))}")
            except Exception as error:  # another library's refusal is a result
                print(f"| {cut} | {library} | cannot: {type(error).__name__}: {error} | |")
                continue
            models[f"{cut} {library}"] = smaller
            print(f"| {cut} | {library} | {statistics.median(taken):.2f} | {smaller.num_parameters():,} |", flush=True)
    return {"dense": dense, **models}


def inference(model: nn.Module, batch: Batch) -> float:
    """CPU seconds of a forward pass without gradients."""
    model.eval()
    with torch.inference_mode():
        return timed(lambda: model(input_ids=batch["input_ids"]))[0]


def training(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, update: bool) -> float:
    """CPU seconds of a training step, or of its forward and backward passes alone."""

    def step() -> None:
        model(**batch).loss.backward()
        if not update:
            return
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.train()
    seconds = timed(step)[0]
    optimizer.zero_grad()
    return seconds


def take_turns(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median seconds of each, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(-1, rounds):
        for name in steps if round % 2 else reversed(steps):
            taken = steps[name]()
            if round >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(models: dict[str, nn.Module], kind: str, options: argparse.Namespace, batch: int) -> None:
    """Let all models take turns at one kind of work, and print the table."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, options.length), generator=generator)
    inputs = {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long)}
    if kind == "inference":
        steps = {name: lambda model=model: inference(model, inputs) for name, model in models.items()}
    else:
        optimizers = {name: torch.optim.AdamW(one.parameters(), lr=1e-5, fused=True) for name, one in models.items()}
        update = kind == "training step"
        steps = {name: lambda n=name: training(models[n], inputs, optimizers[n], update) for name in models}
    seconds = take_turns(steps, options.rounds)
    print(f"\n{kind}, {batch} x {options.length}, median of {options.rounds}\n")
    print("| model | CPU s | ratio to dense | FLOPs ratio | measured / FLOPs |\n| --- | --- | --- | --- | --- |")
    whole = flops(models["dense"], batch, options.length)
    for name, model in models.items():
        ratio, ideal = seconds[name] / seconds["dense"], flops(model, batch, options.length) / whole
        print(f"| {name} | {seconds[name]:.3f} | {ratio:.3f} | {ideal:.3f} | {ratio / ideal:.3f} |", flush=True)


def main() -> None:
    """Cut, then measure everything in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "hidden": 768, "batch": 8, "length": 128, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cuts", nargs="+", default=["8x1840", "8x1843", "6x1536", "4x768"])
    parser.add_argument("--no_training", action="store_true", help="Leave out the training steps.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cutters, other = {"sparse_hf": cut_by_sparse_hf}, torch_pruning_version()
    if other is None:
        print("Torch-Pruning is not installed, so nothing stands beside sparse_hf: pip install torch-pruning==1.6.1\n")
    else:
        print(f"Torch-Pruning {other}, 1 thread\n")
        cutters["Torch-Pruning"] = cut_by_torch_pruning
    models = cut_all(options, cutters)
    for batch in dict.fromkeys((1, options.batch)):
        measure(models, "inference", options, batch)
    for kind in () if options.no_training else ("forward and backward", "training step"):
        measure(models, kind, options, options.batch)


if __name__ == "__main__":
    main()
