"""`sparse-hf plan`: does a sparse training fit, and what do its ranks send?"""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from sparse_hf.cli.messages import console
from sparse_hf.tickets.configs import Budget


if TYPE_CHECKING:
    from sparse_hf.training.memory_plan import MemoryPlan

GIB, MIB, KIB = 2**30, 2**20, 2**10


def plan_training(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    processes: Annotated[list[int] | None, typer.Option(help="Number of GPUs; may be given more than once.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="ddp, fsdp2, zero1, zero2, zero3; may be given more than once.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the Trainer: bf16 (mixed) or fp32.")] = "bf16",
    budget: Annotated[Budget, typer.Option(help="How much stays in each matrix.")] = "global",
    include: Annotated[list[str] | None, typer.Option(help="Patterns of matrices to prune instead of all.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of matrices to leave dense.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON, for programs.")] = False,
) -> None:
    """Tell what a sparse training holds on each GPU and sends to change a mask. Nothing is downloaded but a config."""
    from sparse_hf.cli.model_folder import model_without_weights
    from sparse_hf.training.memory_plan import STRATEGIES, plan_memory

    shapes = model_without_weights(model)
    options = {"precision": precision, "budget": budget, "include": include or None, "exclude": exclude or None}
    plans = [
        plan_memory(shapes, one, number, **options) for number in processes or [8] for one in strategy or STRATEGIES
    ]
    if as_json:
        print(json.dumps([plan.to_dict() for plan in plans], indent=2))
        return
    console.print(_table(plans))
    console.print(
        "GiB per GPU. Activations and communication buffers (but DDP's) come on top, and `change` while masks change. "
        "They are drawn from sums, never from gathered weights; the last two columns are what each GPU sends then.",
        highlight=False,
    )


def _table(plans: "list[MemoryPlan]") -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))  # ten columns fit into 80 characters
    for column in ("GPUs", "strategy"):
        table.add_column(column, no_wrap=True)
    for column in ("weights", "grads", "Adam", "masks", "all", "change", "sums", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        held = (plan.weights, plan.gradients, plan.optimizer, plan.masks, plan.total, plan.mask_update)
        cells = [*map(_gib, held), _kib_or_mib(plan.sums_sent), _gib(plan.weights_sent)]
        table.add_row(str(plan.processes), plan.strategy, *cells)
    return table


def _gib(size: int) -> str:
    gib = size / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}"


def _kib_or_mib(size: int) -> str:
    return f"{size / KIB:.0f} KiB" if size < MIB else f"{size / MIB:.1f} MiB"
