"""What is sparse, as a picture: one cell per matrix, layers downwards."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from sparse_hf.cards.layers import OUTSIDE, place


MOST_ROWS, MOST_COLUMNS = 128, 24  # of a picture; a hostile file could ask for millions


def draw_sparsity(
    sparsity: Mapping[str, float], path: str | Path, title: str, label: str = "fraction of zeros"
) -> Path:
    """Draw fractions by matrix as a heat map, layers by kinds of matrix, and save it.

    Args:
        sparsity: by name of the matrix, in [0, 1]; "name[3]" is expert 3 of a stack.
        path: the picture's file; its ending says the format (.png, .svg, .pdf).
        title, label: what stands above the picture and beside the colours.

    Raises:
        ImportError: matplotlib is not installed (`pip install sparse_hf[demo]`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib. Run `pip install 'sparse_hf[demo]'`.") from error

    cells = _cells(sparsity)
    layers = sorted({layer for layer, _ in cells})[:MOST_ROWS]
    kinds = list(dict.fromkeys(kind for _, kind in cells))[:MOST_COLUMNS]
    grid = [[cells.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    figure = Figure(figsize=(2.5 + 0.9 * len(kinds), 2.2 + 0.45 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    labels = [kind.replace("$", r"\$")[:60] for kind in kinds]  # a dollar sign would begin a formula
    axes.set_xticks(range(len(kinds)), labels, rotation=35, ha="right")
    axes.set_yticks(range(len(layers)), ["outside" if layer == OUTSIDE else str(layer) for layer in layers])
    axes.set_ylabel("layer")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                shade = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=axes, label=label)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)


def _cells(sparsity: Mapping[str, float]) -> dict[tuple[int, str], float]:
    """(layer, kind of matrix) -> sparsity; experts of one layer are averaged."""
    places = [place(name) for name in sparsity]
    stacks = {stack for stack, layer, _ in places if layer != OUTSIDE}  # several in T5: an encoder and a decoder
    gathered: dict[tuple[int, str], list[float]] = {}
    for (stack, layer, kind), value in zip(places, sparsity.values(), strict=True):
        kind = re.sub(r"\bexperts\.\d+\.", "experts.", kind)
        gathered.setdefault((layer, f"{stack} {kind}".strip() if len(stacks) > 1 else kind), []).append(value)
    return {cell: sum(values) / len(values) for cell, values in gathered.items()}
