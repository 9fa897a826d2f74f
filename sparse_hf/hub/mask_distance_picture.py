"""When did the mask settle, as a picture: the distance between the would-be masks of any two checks."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


MOST_LABELS = 12  # per axis; more would overlap


def plot_mask_distances(
    distances: Sequence[Sequence[float]] | Tensor,
    steps: Sequence[int],
    drawn_at: int | None,
    path: str | Path,
    title: str | None = None,
) -> Path:
    """Draw the distances between the masks of all checks as a heat map, as Early-Bird Tickets do, and save it.

    The mask has settled where a block of low distance begins on the diagonal.

    Args:
        distances: checks x checks, as `distance_matrix` computes them: 0 = the same mask, 1 = its complement.
        steps: optimizer step of each check, increasing.
        drawn_at: the check's step at which the ticket was drawn, marked by a line; None marks nothing.
        path: the picture's file; its ending says the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed (`pip install sparse_hf[demo]`).
        ValueError: the distances are not a square of distances, or `steps` or `drawn_at` do not fit them.
    """
    rows = [[float(distance) for distance in row] for row in distances]
    _check(rows, steps, drawn_at)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib. Run `pip install 'sparse_hf[demo]'`.") from error

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis")
    labelled = range(0, len(steps), math.ceil(len(steps) / MOST_LABELS))
    names = [str(steps[check]) for check in labelled]
    axes.set_xticks(labelled, names, rotation=35, ha="right")
    axes.set_yticks(labelled, names)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("optimizer step")
    if drawn_at is not None:
        axes.axvline(list(steps).index(drawn_at), color="tab:red", linestyle="--", label=f"drawn at step {drawn_at}")
        axes.legend(loc="upper right", fontsize=8)
    figure.colorbar(image, ax=axes, label="mask distance")
    axes.set_title(title or f"Distance between the masks of {len(steps)} checks", fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)


def _check(distances: list[list[float]], steps: Sequence[int], drawn_at: int | None) -> None:
    """Raise the ValueError that says what is wrong."""
    checks = len(steps)
    if not checks or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"`steps` must be the increasing steps of at least one check, got {list(steps)}.")
    lengths = sorted({len(row) for row in distances})
    if len(distances) != checks or lengths != [checks]:
        raise ValueError(
            f"`distances` must be {checks} rows of {checks} for {checks} steps, got {len(distances)} rows of "
            f"{' or '.join(map(str, lengths)) or 0}. Pass the distance of every check to every check."
        )
    for column, row in itertools.combinations_with_replacement(range(checks), 2):
        value, mirrored = distances[row][column], distances[column][row]
        if not 0 <= value <= 1 or value != mirrored or (row == column and value != 0):
            raise ValueError(
                "`distances` must be symmetric, in [0, 1] and 0 on the diagonal, "
                f"got {value} at [{row}][{column}] and {mirrored} at [{column}][{row}]. "
                "Pass what `distance_matrix` returned."
            )
    if drawn_at is not None and drawn_at not in steps:
        raise ValueError(
            f"`drawn_at` must be the step of a check, got {drawn_at}, not among {', '.join(map(str, steps))}. "
            "Pass one of them, or None."
        )
