"""What is sparse in a ticket, as a picture: one cell per matrix, layers downwards."""

from pathlib import Path

from sparse_hf.cards.sparsity_picture import draw_sparsity
from sparse_hf.tickets.ticket import Ticket


def plot_sparsity(ticket: Ticket, path: str | Path, title: str | None = None) -> Path:
    """Draw the sparsity of every matrix as a heat map, layers by kinds of matrix, and save it.

    Args:
        path: the picture's file; its ending says the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed (`pip install sparse_hf[demo]`).
    """
    title = title or f"{ticket.sparsity:.1%} of {ticket.num_weights:,} prunable weights are zero"
    return draw_sparsity(ticket.sparsity_by_site(), path, title)
