"""`sparse-hf prune`: prune a model once and save it."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_hf.cli.messages import console
from sparse_hf.tickets.configs import Budget


def prune_folder(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    output: Annotated[Path, typer.Argument(help="New folder for the sparse model.")],
    sparsity: Annotated[
        float, typer.Option(help="Fraction of the prunable weights that become zero, in [0, 1).")
    ] = 0.5,
    score: Annotated[str, typer.Option(help="magnitude, or random (a control).")] = "magnitude",
    budget: Annotated[Budget, typer.Option(help="How much stays in each matrix.")] = "global",
    include: Annotated[list[str] | None, typer.Option(help="Patterns of matrices to prune instead of all.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of matrices to leave dense.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random score.")] = 0,
) -> None:
    """Set the least important weights of a model to zero; the result is a stock model folder with its masks."""
    from sparse_hf.cli.model_folder import load_with_head, save_sparse
    from sparse_hf.tickets.prune import prune

    if score not in ("magnitude", "random"):
        raise ValueError(f"Without data the score must be magnitude or random, got {score!r}. Use the Python API.")
    loaded, tokenizer = load_with_head(model, output)
    options = {"score": score, "budget": budget, "include": include or None, "exclude": exclude or None, "seed": seed}
    ticket = prune(loaded, sparsity, **options)
    save_sparse(loaded, tokenizer, ticket, output)
    whole = ticket.model_sparsity()
    console.print(
        f"{ticket.sparsity:.2%} of the prunable weights ({whole:.2%} of the model) are zero: {output}", markup=False
    )
