"""How evenly are tokens spread over experts, as a picture: one cell per expert, layers downwards."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_hf.algorithms.expert_load import DEAD_BELOW
from sparse_hf.moe.usage import ExpertUsage


MOST_NUMBERS = 16  # experts up to which every cell shows its number
MOST_LABELS = 16  # per axis
REACH = 3  # doublings above and below a fair share that colours tell apart


def plot_expert_load(
    load: ExpertUsage | Tensor,
    path: str | Path,
    title: str | None = None,
    layers: Sequence[object] | None = None,
) -> Path:
    """Draw how often each expert was chosen, against a fair share, as a heat map, and save it.

    White is a fair share, 1 / experts of all choices of the layer; each doubling or halving is one step of colour, up
    to 8 times and an eighth. A cross marks dead experts (below 5 % of a fair share). The scale is always the same, so
    pictures can be compared.

    Args:
        load: `expert_usage(...)`, or counts (layers, experts), such as `usage_by_class(...).counts[0]`.
        path: the picture's file; its ending says the format (.png, .svg, .pdf).
        layers: labels of the layers; None: their numbers.

    Raises:
        ImportError: matplotlib is not installed (`pip install sparse_hf[demo]`).
        ValueError: the counts are not (layers, experts), a layer has none, or the labels do not fit.
    """
    counts, numbers = load, None
    if isinstance(load, ExpertUsage):
        counts, numbers = torch.stack(list(load.counts.values())), list(load.counts)
    names = [str(one) for one in layers or numbers or range(len(counts))]
    shares = _shares(counts, names)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib. Run `pip install 'sparse_hf[demo]'`.") from error

    experts = len(shares[0])
    figure = Figure(
        figsize=(min(16.0, 3 + max(3.0, 0.45 * experts)), min(14.0, 2 + max(1.5, 0.3 * len(shares)))),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    doublings = [[max(-REACH, min(REACH, math.log2(one))) if one else -REACH for one in row] for row in shares]
    image = axes.imshow(doublings, vmin=-REACH, vmax=REACH, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    for axis, labels in ((axes.xaxis, [str(one) for one in range(experts)]), (axes.yaxis, names)):
        shown = range(0, len(labels), math.ceil(len(labels) / MOST_LABELS))
        axis.set_ticks(list(shown), [labels[one] for one in shown])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    _write_cells(axes, shares)
    colours = figure.colorbar(image, ax=axes, extend="both")
    ticks = ["1/8", "1/4", "1/2", f"fair (1/{experts})", "x 2", "x 4", "x 8"]
    colours.set_ticks(list(range(-REACH, REACH + 1)), labels=ticks)
    axes.set_title(title or f"Load of {experts} experts in {len(shares)} layers", fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)


def _write_cells(axes: object, shares: list[list[float]]) -> None:
    """A cross on dead experts; the share on others, where there is room."""
    for layer, row in enumerate(shares):
        for expert, share in enumerate(row):
            dead = share < DEAD_BELOW
            if dead or len(row) <= MOST_NUMBERS:
                shade = "white" if not 0.25 < share < 4 else "black"
                text = "×" if dead else f"{share:.1f}"
                axes.text(expert, layer, text, ha="center", va="center", color=shade, fontsize=8)


def _shares(counts: Tensor, names: list[str]) -> list[list[float]]:
    """Counts of each layer, divided by their mean."""
    if counts.ndim != 2 or not counts.numel():
        raise ValueError(
            f"`load` must be counts of (layers, experts), got {list(counts.shape)}. Pass those of a class."
        )
    if len(names) != len(counts):
        raise ValueError(f"`layers` must name each of {len(counts)} layers, got {len(names)} names.")
    means = counts.double().mean(dim=1, keepdim=True)
    right = (counts >= 0).all(dim=1) & (means[:, 0] > 0)
    if not right.all():
        wrong = names[int((~right).nonzero()[0])]
        raise ValueError(f"Every layer must have counts of 0 or more, and at least one choice; layer {wrong} has not.")
    return (counts.double() / means).tolist()
