"""`sparse-hf experts`: how much the experts of a mixture are used, fewer of them, and the dense model again."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparse_hf.cli.messages import console, short_errors


app = typer.Typer(no_args_is_help=True, help="Measure, drop or merge experts, or go back to a dense model.")

Source = Annotated[str, typer.Argument(help="Folder or Hub id of a mixture of experts.")]
Destination = Annotated[Path, typer.Argument(help="New folder.")]
UsageFile = Annotated[Path, typer.Option(help="What `sparse-hf experts usage` wrote.")]
Measure = Literal["counts", "weights"]
By = Annotated[Measure, typer.Option(help="Usage by how often an expert is chosen, or by its routing weights.")]


@app.command("usage")
@short_errors
def measure_usage(
    model: Source,
    texts: Annotated[Path, typer.Argument(help="Text file, one text a line.")],
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a text that are read.")] = 512,
) -> None:
    """Count how often each expert is chosen on texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparse_hf.moe.usage import expert_usage, save_usage

    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or max_length < 1:
        raise ValueError(f"There must be a text and a token to read, got {len(lines)} texts in `{texts}`.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    batches = (tokenizer(line, return_tensors="pt", truncation=True, max_length=max_length) for line in lines)
    usage = expert_usage(loaded, (batch for batch in batches if batch["input_ids"].numel()))
    save_usage(usage, output)
    for layer, counts in usage.counts.items():
        shares = " ".join(f"{share:.0%}" for share in (counts / counts.sum().clamp(min=1)).tolist())
        console.print(f"layer {layer}: {shares}", markup=False, soft_wrap=True)


@app.command("drop")
@short_errors
def drop(
    source: Source,
    destination: Destination,
    usage: UsageFile,
    keep: Annotated[int, typer.Option(help="Experts of each layer that stay: the most used.")],
    by: By = "counts",
) -> None:
    """Write the mixture with its most used experts only."""
    from sparse_hf.moe.thin_experts import drop_experts

    _say(destination, drop_experts(source, destination, _usage(usage, by), keep), f"{keep} experts per layer")


@app.command("merge")
@short_errors
def merge(
    source: Source,
    destination: Destination,
    usage: UsageFile,
    groups: Annotated[int, typer.Option(help="Experts per layer of the new mixture.")],
    by: By = "counts",
) -> None:
    """Write the mixture with its most used experts, the others averaged into those most like them."""
    from sparse_hf.moe.thin_experts import merge_experts

    _say(destination, merge_experts(source, destination, _usage(usage, by), groups), f"{groups} experts per layer")


@app.command("densify")
@short_errors
def densify_folder(
    source: Source,
    destination: Destination,
    expert: Annotated[str, typer.Option(help="average, or the number of one expert.")] = "average",
    usage: Annotated[Path | None, typer.Option(help="Usage file: weights of the average.")] = None,
    by: By = "counts",
    target: Annotated[str | None, typer.Option(help="Model type of the dense model, if it is not known.")] = None,
    ignore_shared: Annotated[bool, typer.Option("--ignore-shared", help="Leave a shared expert out.")] = False,
) -> None:
    """Write the dense model whose FFNs are the average of the experts, or one of them."""
    from sparse_hf.moe.densify import densify

    chosen = int(expert) if expert.isdecimal() else expert
    weights = None if usage is None else _usage(usage, by)
    complete = densify(source, destination, chosen, weights, target=target, ignore_shared=ignore_shared)
    _say(destination, complete, "a dense model")


def _usage(path: Path, by: Measure) -> dict:
    from sparse_hf.moe.usage import load_usage

    return getattr(load_usage(path), by)


def _say(destination: Path, complete: bool, what: str) -> None:
    state = f"written, {what}" if complete else "other processes still write; the last one completes it"
    console.print(f"{destination}: {state}", markup=False, soft_wrap=True)
