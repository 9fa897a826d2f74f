"""Upcycle a small causal model, train it on text of several domains, and hold it against the dense model's training.

    python recipes/upcycle_lm.py --model_name_or_path MODEL --domains stories=stories.txt code=code.jsonl \
        --experts 8 --top_k 2 --output_dir out/upcycle
    accelerate launch recipes/upcycle_lm.py ...

Both are trained on the same blocks in the same order at a constant rate after warm-up, so one dense run, a little
longer, is read at equal tokens and at equal FLOPs. Losses are of held-out blocks by domain, without the balance loss.
Then each expert's share of the tokens is told by domain. Text files are read by line, .json and .jsonl by row; a
domain's first blocks are held out. A training that is finished is not repeated.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from sparse_hf import BalanceConfig, ExpertInit, SparseTrainer, expert_usage, fit_routers, upcycle


Blocks = list[dict[str, list[int]]]
DEFAULTS = {
    "max_steps": 400,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "per_device_train_batch_size": 16,
    "eval_steps": 50,
    "save_strategy": "no",
}


@dataclass
class Arguments:
    """What is run."""

    model_name_or_path: str = field(metadata={"help": "A dense causal model of a family that can be upcycled."})
    domains: list[str] = field(metadata={"help": "name=FILE of each domain: .txt, .json, .jsonl, also .gz."})
    experts: int = field(default=8, metadata={"help": "Copies of each FFN."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    granularity: int = field(default=1, metadata={"help": "Experts that each copy is cut into."})
    target: str | None = field(default=None, metadata={"help": "Model type of the mixture; default: the family's."})
    router: str = field(default="normal", metadata={"help": "How routers begin: normal, or fitted to the domains."})
    balance: float = field(default=0.01, metadata={"help": "Coefficient of the balance loss; 0 only measures."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a block."})
    blocks: int = field(default=1000, metadata={"help": "Blocks of each domain at most."})
    held_out: int = field(default=32, metadata={"help": "Blocks of each domain to measure on."})


def read_texts(file: str) -> list[str]:
    """The lines of a text file, or the text fields of each row, one below the other."""
    kind = "text" if ".txt" in Path(file).suffixes else "json"
    rows = load_dataset(kind, data_files=file, split="train")
    return ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]


def blocks_of(texts: list[str], tokenizer, arguments: Arguments) -> Blocks:
    """Texts one after the other, cut into blocks of equal length; what is left over is left out."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= (arguments.blocks + arguments.held_out) * arguments.block_size:
            break
    size = arguments.block_size
    starts = range(0, len(ids) - size + 1, size)
    return [{"input_ids": ids[start : start + size], "labels": ids[start : start + size]} for start in starts]


def batches(blocks: Blocks, model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Of 16 blocks, on the model's device."""
    tensors = [torch.tensor([one["input_ids"] for one in blocks[i : i + 16]]) for i in range(0, len(blocks), 16)]
    return [{"input_ids": ids.to(model.device), "labels": ids.to(model.device)} for ids in tensors]


@torch.no_grad()
def losses(model: nn.Module, held_out: dict[str, Blocks]) -> dict[str, float]:
    """Mean loss per domain; all blocks are equally long, so the mean of batches is right."""
    training = model.training
    model.eval()
    found = {}
    for name, blocks in held_out.items():
        one = [(float(model(**batch).loss), len(batch["input_ids"])) for batch in batches(blocks, model)]
        found[name] = sum(loss * count for loss, count in one) / sum(count for _, count in one)
    model.train(training)
    return found | {"mean": sum(found.values()) / len(found)}


def active_parameters(model: nn.Module, share: float) -> float:
    """Weights that a token meets in matrices, `share` of them in experts; twice that are FLOPs, but for attention."""
    named = [(name, one.numel()) for name, one in model.named_parameters() if one.dim() > 1]
    return sum(count * (share if ".experts." in name else 1.0) for name, count in named)


class Curve(TrainerCallback):
    """Measures before the first step and every so many steps."""

    def __init__(self, held_out: dict[str, Blocks], marks: set[int]) -> None:
        self.held_out, self.marks, self.points = held_out, marks, []

    def on_step_begin(self, args, state, control, model=None, **others):
        if state.global_step in self.marks:
            self.points.append({"step": state.global_step, **losses(model, self.held_out)})

    def on_train_end(self, args, state, control, model=None, **others):
        self.points.append({"step": state.global_step, **losses(model, self.held_out)})


def train(
    model: nn.Module,
    args: TrainingArguments,
    data: Blocks,
    held_out: dict[str, Blocks],
    marks: set[int],
    balance: BalanceConfig | None = None,
) -> list[dict]:
    """Train and save in `args.output_dir`; the curve, from disk if it is there."""
    file = Path(args.output_dir) / "curve.json"
    if not file.is_file():
        parts = {"train_dataset": data, "data_collator": default_data_collator}
        trainer = SparseTrainer(model, args, **parts, callbacks=[curve := Curve(held_out, marks)], balance=balance)
        trainer.train()
        trainer.save_model()
        file.write_text(json.dumps(curve.points))
    return json.loads(file.read_text())


def main() -> None:
    """Upcycle, train both, print curves and loads."""
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    arguments, args = parser.parse_args_into_dataclasses()
    out, source = Path(args.output_dir), arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = {name: read_texts(file) for name, _, file in (one.partition("=") for one in arguments.domains)}
    blocks = {name: blocks_of(one, tokenizer, arguments) for name, one in texts.items()}
    held_out = {name: one[: arguments.held_out] for name, one in blocks.items()}
    data = [block for one in blocks.values() for block in one[arguments.held_out :]]

    if not (out / "upcycled" / "config.json").is_file():
        count = arguments.held_out
        first = {name: one[count : 2 * count] for name, one in blocks.items()}  # of what is trained on
        samples = {name: [tokenizer.decode(block["input_ids"]) for block in one] for name, one in first.items()}
        rows = fit_routers(source, samples).rows if arguments.router == "fitted" else None
        options = {"target": arguments.target, "router_rows": rows, "seed": args.seed}
        init = ExpertInit(granularity=arguments.granularity)
        print(upcycle(source, out / "upcycled", arguments.experts, arguments.top_k, init=init, **options))

    def start(name: str, folder: str | Path) -> tuple[nn.Module, TrainingArguments]:
        set_seed(args.seed)
        one = copy.copy(args)
        one.output_dir = str(out / name)
        return AutoModelForCausalLM.from_pretrained(folder), one

    (mixture, mixture_args), (dense, dense_args) = start("mixture", out / "upcycled"), start("dense", source)
    share = arguments.top_k / (arguments.experts * arguments.granularity)
    ratio = active_parameters(mixture, share) / active_parameters(dense, 1.0)
    marks = {*range(0, args.max_steps, int(args.eval_steps)), args.max_steps}
    equal = {mark: round(mark * ratio) for mark in marks}  # dense's step when it has spent as many FLOPs
    dense_args.max_steps = max(args.max_steps, equal[args.max_steps])
    ours = train(mixture, mixture_args, data, held_out, marks, BalanceConfig(arguments.balance))
    theirs = train(dense, dense_args, data, held_out, marks | {*equal.values()})

    print(f"\nFLOPs per token: {ratio:.2f} x dense. Mean held-out loss:\n")
    print("| step | mixture | dense, equal tokens | dense, equal FLOPs |\n| --- | --- | --- | --- |")
    at = {point["step"]: point["mean"] for point in theirs}
    for point in ours:
        step = point["step"]
        print(f"| {step} | {point['mean']:.4f} | {at[step]:.4f} | {at[equal[step]]:.4f} |")
    model = AutoModelForCausalLM.from_pretrained(out / "mixture").eval()
    loads = {name: expert_usage(model, batches(one, model)).counts for name, one in held_out.items()}
    print_loads(loads)


def print_loads(loads: dict[str, dict[int, torch.Tensor]]) -> None:
    """Each expert's share of a domain's tokens in the middle layer, and how uneven every layer is over all domains."""
    layers = sorted(next(iter(loads.values())))
    middle = layers[len(layers) // 2]
    print(f"\nShare of the tokens by expert, layer {middle}, times the number of experts:\n")
    for name, counts in loads.items():
        share = counts[middle] / counts[middle].sum() * len(counts[middle])
        print(f"{name:>12}: " + " ".join(f"{one:5.2f}" for one in share.tolist()))
    totals = {layer: sum(counts[layer] for counts in loads.values()).double() for layer in layers}
    worst = ", ".join(f"{float(one.max() / one.mean() - 1):.2f}" for one in totals.values())
    print(f"\nMaxVio (largest load / mean - 1) by layer: {worst}")


if __name__ == "__main__":
    main()
