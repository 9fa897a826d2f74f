"""What does a training step with DSEE cost in time and memory, beside LoRA, SHiRA, Super-Tuning and full fine-tuning?

    python benchmarks/dsee_speed.py [--layers 3 --batch 8 --length 128 --r 8 --rounds 7 --threads 1]
        [--families GPT-2 BERT] [--parts memory steps inference]

Random models of GPT-2 small's shape (width 768, 12 heads; 3 of its 12 layers by default), float32, without dropout;
every matrix of every layer is tuned. The vocabulary is cut to 1,024, so that ratios are those of the layers: a real
one adds the same to all sides and brings them closer. A step is forward, backward and fused AdamW.

Two families. GPT-2's own layers are `Conv1D`, which SHiRA and Super-Tuning do not take; so those stand beside LoRA and
ours in a BERT of the same width, whose layers are `nn.Linear`, and there all train as many values as LoRA does (ours
and SHiRA's: equal to the last one; Super-Tuning rounds down in each matrix). "1 %" is of all tuned matrices together,
the same number in each of them. The released code's way is LoRA beside a second `nn.Linear` under
`torch.nn.utils.prune`. The floor, "frozen base", trains one bias vector of the first layer, so that gradients go all
the way down.

Sides take turns in one process. Times are medians of CPU seconds of the process, which a busy machine disturbs less
than wall time; ratios are medians of the rounds' ratios. Memory is taken in a process of each side's own, forked
before anything else, after two steps: the live tensors' bytes between steps (weights, moments, indices, masks; no
gradients), and the same plus the rise of resident memory in a step (Linux only; what is not tensors is left out).
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from sparse_hf import DseeConfig


VOCABULARY = 1024
TARGETS = {"GPT-2": r".*\.(c_attn|c_proj|c_fc)", "BERT": r".*encoder\.layer\..*(query|key|value|dense)"}
FIRST_BIAS = {"GPT-2": "transformer.h.0.attn.c_attn.bias", "BERT": "bert.encoder.layer.0.attention.self.query.bias"}
MIB = 1 << 20
Make = Callable[[nn.Module], nn.Module]


class ReleasedDsee(nn.Module):
    """An adapted layer as in the released code: S2 is a linear layer of the matrix's size under a pruning mask."""

    def __init__(self, base: nn.Module, r: int, nnz: int) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]
        self.sparse = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.sparse.weight)
        mask = torch.zeros(outputs * inputs)
        mask[torch.randperm(mask.numel())[:nnz]] = 1
        prune.custom_from_mask(self.sparse, "weight", mask.view(outputs, inputs))
        self.V, self.U = nn.Parameter(0.02 * torch.randn(r, inputs)), nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus both updates."""
        return self.base(x) + 2.0 * (F.linear(F.linear(x, self.V), self.U) + self.sparse(x))


def build(family: str, options: argparse.Namespace) -> nn.Module:
    """The same random model for every side."""
    torch.manual_seed(0)
    if family == "GPT-2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_layer": options.layers, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, use_cache=False))
    else:
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        sizes = {"num_hidden_layers": options.layers, "vocab_size": VOCABULARY}
        model = BertForSequenceClassification(BertConfig(**sizes, **dropout))
    return model.train()


def targets(model: nn.Module, family: str) -> dict[str, nn.Module]:
    """The tuned layers."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    return {name: one for name, one in layers.items() if re.fullmatch(TARGETS[family], name)}


def only_first_bias(model: nn.Module, family: str) -> nn.Module:
    """The frozen base with the one trained vector that lets gradients flow."""
    model.requires_grad_(False).get_parameter(FIRST_BIAS[family]).requires_grad_(True)
    return model


def released_way(model: nn.Module, family: str, r: int, nnz: int) -> nn.Module:
    """Every tuned layer as the released code has it."""
    model.requires_grad_(False)
    for name, layer in targets(model, family).items():
        model.set_submodule(name, ReleasedDsee(layer, r, nnz))
    return model


def sides(family: str, options: argparse.Namespace) -> dict[str, Make]:
    """How each side is made from the base; the sides of one family share its tables."""
    with torch.device("meta"):
        matrices = [layer.weight for layer in targets(build(family, options), family).values()]
    weights, r = sum(one.numel() for one in matrices), options.r
    percent = round(0.01 * weights / len(matrices))
    lora_count = sum(r * sum(one.shape) for one in matrices)

    def tuned_by(method: type[PeftConfig], **settings: object) -> Make:
        settings |= {"target_modules": TARGETS[family]}
        return lambda model: get_peft_model(model, method(**settings))

    lora = tuned_by(LoraConfig, r=r, lora_alpha=2 * r, fan_in_fan_out=family == "GPT-2")
    common: dict[str, Make] = {
        "frozen base": lambda model: only_first_bias(model, family),
        f"PEFT LoRA r={r}": lora,
        f"DSEE r={r}, nnz=64": tuned_by(DseeConfig, r=r, nnz=64),
        f"DSEE r={r}, 1 %": tuned_by(DseeConfig, r=r, nnz=percent),
    }
    if family == "GPT-2":
        return common | {
            f"DSEE r={r}, nnz=64, S1 30 %": tuned_by(DseeConfig, r=r, nnz=64, base_sparsity=0.3),
            "S2 alone, nnz=64": tuned_by(DseeConfig, r=0, nnz=64),
            "S2 alone, 1 %": tuned_by(DseeConfig, r=0, nnz=percent),
            "DSEE, released code's way, nnz=64": lambda model: released_way(model, family, r, 64),
            "full fine-tuning": lambda model: model,
        }
    return common | {
        f"PEFT Super-Tuning r={r}, 1 %": tuned_by(SupertuningConfig, r=r, sparsity=0.99),
        "S2 alone, LoRA's count": tuned_by(DseeConfig, r=0, nnz=lora_count // len(matrices)),
        "PEFT SHiRA, LoRA's count": tuned_by(ShiraConfig, r=r, random_seed=0),
        "PEFT Super-Tuning, LoRA's count": tuned_by(SupertuningConfig, sparsity=1 - lora_count / weights),
        "full fine-tuning": lambda model: model,
    }


class Side:
    """A model and its optimizer."""

    def __init__(self, family: str, make: Make, options: argparse.Namespace) -> None:
        self.model = make(build(family, options))
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.count = sum(one.numel() for one in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
        labels = ids if family == "GPT-2" else torch.zeros(options.batch, dtype=torch.long)
        self.batch = {"input_ids": ids, "labels": labels}

    def step(self) -> None:
        """One training step."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def memory(family: str, name: str, options: argparse.Namespace, answer: multiprocessing.Queue) -> None:
    """Answer with the peak in a step, the bytes of tensors between steps, and the trained count."""
    torch.set_num_threads(options.threads)
    libc = ctypes.CDLL("libc.so.6")
    for setting in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: give memory back as soon as it is free
        libc.mallopt(setting, 1 << 16)
    side = Side(family, sides(family, options)[name], options)
    for _ in range(2):
        side.step()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    side.step()
    rise = resident("VmHWM") - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    held = sum({one.data_ptr(): one.nbytes() for one in tensors}.values())
    answer.put((held + rise, held, side.count))


def resident(field: str) -> int:
    """Bytes of this process, by the kernel's name of the figure."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def print_memory(family: str, options: argparse.Namespace) -> None:
    """Every side in a process of its own, beside the frozen base."""
    fork, found = multiprocessing.get_context("fork"), {}
    for name in sides(family, options):
        answer = fork.Queue()
        process = fork.Process(target=memory, args=(family, name, options, answer))
        process.start()
        found[name] = answer.get()
        process.join()
    floor_peak, floor_held, _ = found["frozen base"]
    print(f"\nmemory beyond the frozen base, {family}: MiB (its peak: {floor_peak / MIB:,.0f})\n")
    print("| side | trained values | held between steps | with gradients | peak in a step |")
    print("| --- | --- | --- | --- | --- |")
    for name, (peak, held, count) in found.items():
        mib = ((held - floor_held) / MIB, (held - floor_held + 4 * count) / MIB, (peak - floor_peak) / MIB)
        print(f"| {name} | {count:,} | {mib[0]:.1f} | {mib[1]:.1f} | {mib[2]:.0f} |", flush=True)


def take_turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each in every round, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round in range(-2, rounds):
        for name in works if round % 2 else reversed(works):
            start = time.process_time()
            works[name]()
            if round >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def print_times(seconds: dict[str, list[float]], beside: list[str]) -> None:
    """A row of each side, with its ratio to each of `beside`."""
    print("| side | CPU s | lowest to highest |" + "".join(f" / {one} |" for one in beside))
    print("| --- | --- | --- |" + " --- |" * len(beside))
    for name, values in seconds.items():
        ratios = "".join(f" {ratio(values, seconds[one]):.3f} |" for one in beside)
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |{ratios}")


def ratio(values: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


def print_steps(family: str, options: argparse.Namespace) -> None:
    """All sides of a family in turns, and what the goals say."""
    made = {name: Side(family, make, options) for name, make in sides(family, options).items()}
    seconds = take_turns({name: side.step for name, side in made.items()}, options.rounds)
    lora = f"PEFT LoRA r={options.r}"
    print(f"\ntraining step, {family}, {options.batch} x {options.length}, median of {options.rounds}\n")
    print_times(seconds, [lora, "frozen base"])
    goals = {f"DSEE r={options.r}, nnz=64": 1.05, f"DSEE r={options.r}, 1 %": 1.15}
    for name, goal in goals.items():
        print(f"\n{name}: {ratio(seconds[name], seconds[lora]):.3f} x LoRA, goal at most {goal:.2f}", flush=True)


def print_inference(options: argparse.Namespace) -> None:
    """A dense GPT-2 beside one that had an adapter, merged, and one that still has it."""
    config = DseeConfig(r=options.r, nnz=64, target_modules=TARGETS["GPT-2"], init_weights=False)
    models = {
        "dense": build("GPT-2", options),
        "DSEE, merged": get_peft_model(build("GPT-2", options), config).merge_and_unload(),
        "DSEE, not merged": get_peft_model(build("GPT-2", options), config),
    }
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    works = {name: partial(model.eval(), input_ids=ids) for name, model in models.items()}
    print(f"\ninference, GPT-2, {options.batch} x {options.length}, median of {2 * options.rounds}\n")
    with torch.inference_mode():
        print_times(take_turns(works, 2 * options.rounds), ["dense"])


def main() -> None:
    """Memory first, since a process that has computed should not be forked; then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 3, "batch": 8, "length": 128, "r": 8, "rounds": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--families", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parts = ["memory", "steps", "inference"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part, measure in {"memory": print_memory, "steps": print_steps}.items():
        for family in options.families if part in options.parts else ():
            measure(family, options)
    if "inference" in options.parts:
        print_inference(options)


if __name__ == "__main__":
    main()
