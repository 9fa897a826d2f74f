"""`sparse-hf ticket ...`: look at tickets, compare them, apply them, share them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparse_hf.cli.messages import console, short_errors


app = typer.Typer(no_args_is_help=True, help="Look at tickets, compare them, apply them, share them.")
TicketName = Annotated[str, typer.Argument(help="Folder or Hub id of a ticket, or of a model saved with masks.")]


@app.command("show")
@short_errors
def show(
    ticket: TicketName,
    picture: Annotated[
        Path | None, typer.Option(help="Also save a heat map of sparsity per layer here (.png).")
    ] = None,
) -> None:
    """Say where a ticket comes from and how sparse each matrix is; no model is loaded."""
    from sparse_hf.tickets.ticket import Ticket

    loaded = Ticket.from_pretrained(ticket)
    origin = loaded.origin
    facts = {
        "method": origin.method,
        "base model": origin.base_model,
        "revision": origin.base_revision,
        "architecture": origin.model_type,
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in origin.metrics.items()),
    }
    for name, value in facts.items():
        console.print(f"{name}: {value or 'not recorded'}", markup=False, highlight=False)
    table = Table(
        "matrix", "zeros", title=f"{loaded.num_weights - loaded.num_kept:,} of {loaded.num_weights:,} are zero"
    )
    for name, sparsity in loaded.sparsity_by_site().items():
        table.add_row(name, f"{sparsity:.2%}")
    table.add_section()
    table.add_row("all prunable weights", f"{loaded.sparsity:.2%}")
    whole = loaded.model_sparsity()
    table.add_row("whole model", "size not recorded" if whole is None else f"{whole:.2%}")
    console.print(table)
    if picture is not None:
        from sparse_hf.hub.sparsity_picture import plot_sparsity

        console.print(f"picture: {plot_sparsity(loaded, picture)}", markup=False)


@app.command("compare")
@short_errors
def compare(first: TicketName, second: TicketName) -> None:
    """Overlap and distance of two tickets of one architecture."""
    from sparse_hf.tickets.ticket import Ticket

    one, other = Ticket.from_pretrained(first), Ticket.from_pretrained(second)
    console.print(f"sparsity: {one.sparsity:.2%} and {other.sparsity:.2%}")
    console.print(f"overlap (kept by both / kept by either): {one.overlap(other):.4f}")
    console.print(f"distance (fraction of differing positions): {one.distance(other):.4f}")


@app.command("apply")
@short_errors
def apply(
    ticket: TicketName,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    output: Annotated[Path, typer.Argument(help="New folder for the sparse model.")],
    check_base: Annotated[bool, typer.Option(help="Refuse a model with other weights than the ticket's base.")] = True,
) -> None:
    """Zero a model's weights by a ticket and save it as a stock model folder."""
    from sparse_hf.cli.model_folder import load_with_head, save_sparse
    from sparse_hf.tickets.ticket import Ticket

    loaded, tokenizer = load_with_head(model, output)
    used = Ticket.from_pretrained(ticket)
    save_sparse(used.apply(loaded, check_base), tokenizer, used, output)
    console.print(f"{used.sparsity:.2%} of the prunable weights are zero: {output}", markup=False)


@app.command("push")
@short_errors
def push(
    ticket: Annotated[Path, typer.Argument(help="Folder of a ticket.")],
    repo_id: Annotated[str, typer.Argument(help="Hub id, e.g. me/bert-sst2-ticket-60.")],
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
) -> None:
    """Upload a ticket to the Hub."""
    from sparse_hf.tickets.ticket import Ticket

    console.print(Ticket.from_pretrained(ticket).push_to_hub(repo_id, private=private), markup=False)
