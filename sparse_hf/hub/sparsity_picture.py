"""What is sparse, as a picture: one cell per matrix, layers downwards."""

import math
import re
from pathlib import Path

from sparse_hf.tickets.ticket import Ticket


def plot_sparsity(ticket: Ticket, path: str | Path, title: str | None = None) -> Path:
    """Draw the sparsity of every matrix as a heat map, layers by kinds of matrix, and save it.

    Args:
        path: the picture's file; its ending says the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed (`pip install sparse_hf[demo]`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib. Run `pip install 'sparse_hf[demo]'`.") from error

    cells = _cells(ticket)
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = [[cells.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    figure = Figure(figsize=(2.5 + 0.9 * len(kinds), 2.2 + 0.45 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "outside" for layer in layers])
    axes.set_ylabel("layer")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                shade = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=axes, label="fraction of zeros")
    axes.set_title(title or f"{ticket.sparsity:.1%} of {ticket.num_weights:,} prunable weights are zero", fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)


def _cells(ticket: Ticket) -> dict[tuple[int, str], float]:
    """(layer, kind of matrix) -> sparsity; experts of one layer are averaged."""
    places = [_place(name) for name in ticket.bits]
    stacks = {stack for stack, layer, _ in places if layer >= 0}  # several in T5, which has an encoder and a decoder
    gathered: dict[tuple[int, str], list[float]] = {}
    for name, sparsity in ticket.sparsity_by_site().items():
        stack, layer, kind = _place(name)
        gathered.setdefault((layer, f"{stack} {kind}".strip() if len(stacks) > 1 else kind), []).append(sparsity)
    return {cell: sum(values) / len(values) for cell, values in gathered.items()}


def _place(name: str) -> tuple[str, int, str]:
    """Stack of layers, layer (-1 outside), kind of matrix: "encoder.layer", 3, "attention.self.query"."""
    stack, layer, kind = re.fullmatch(r"(?:(.*?)\.(\d+)\.)?(.*?)(?:\.weight)?(?:\[\d+\])?", name).groups()
    return stack or "", int(layer or -1), kind
