"""What heads and neurons cost in time on one machine, and which counts are worth keeping for a target speed-up."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sparse_hf.algorithms.knapsack import choose_counts


PURPOSES = ("training", "inference")
LONGEST = 86400.0  # seconds; no step takes a day, and sums of such numbers stay finite
RESOLUTION = 16384  # steps of the knapsack: 24 groups waste at most 0.15 % of what can be spent


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a model's step by its unit counts: `fixed` plus one of `heads` and one of `neurons` per layer.

    What a layer costs whatever its counts is in both columns, half each: only sums of the two mean something.

    Args:
        heads: seconds of a layer's attention with 1, 2, ... all heads (key/value groups), non-decreasing.
        neuron_counts: counts of FFN neurons, ascending, the last one all of a layer.
        neurons: seconds of a layer's FFN at these counts, non-decreasing; linear in between.
        fixed: seconds of embeddings, task head and everything else outside the layers.
        layers: number of layers.
        dense: seconds of the whole model with all units.
        what: "training" is forward and backward, "inference" is forward.
        batch: examples per step.
        length: tokens or patches per example, as the layers see them.
        device: where it was measured.
        threads: of PyTorch on the CPU.

    Raises:
        ValueError: a number that cannot have been measured; the table may come from a file.
    """

    heads: tuple[float, ...]
    neuron_counts: tuple[int, ...]
    neurons: tuple[float, ...]
    fixed: float
    layers: int
    dense: float
    what: str
    batch: int
    length: int
    device: str
    threads: int

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise ValueError(f"A latency table must hold what was measured: {problem}. Measure it again.")

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, content: object) -> "LatencyTable":
        """The table that `to_dict` wrote.

        Raises:
            ValueError: it is not such a table.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"A latency table must have the entries {sorted(names)}, got {reprlib.repr(content)}.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})

    def predicted(self, counts: Mapping[str, int]) -> float:
        """Seconds of the model with these unit counts.

        Args:
            counts: kept units by unit key, of every layer. Fewer neurons than the smallest measured count cost as
                much as that.

        Raises:
            ValueError: counts of another model, or out of their range.
        """
        self._check_units(counts)
        for key, count in counts.items():
            most = self._width(key)
            if not 1 <= count <= most:
                raise ValueError(f"`{key}` must keep 1 to {most} units, got {count}.")
        return self.fixed + math.fsum(self._seconds(key, count) for key, count in counts.items())

    def _seconds(self, key: str, count: int) -> float:
        if _kind(key) == "heads":
            return self.heads[count - 1]
        return float(np.interp(count, self.neuron_counts, self.neurons))

    def _width(self, key: str) -> int:
        return len(self.heads) if _kind(key) == "heads" else self.neuron_counts[-1]

    def _check_units(self, keys: Mapping[str, object]) -> None:
        found = {kind: sum(_kind(key) == kind for key in keys) for kind in ("heads", "neurons")}
        if len(keys) != sum(found.values()) or set(found.values()) != {self.layers}:
            raise ValueError(
                f"The latency table is of {self.layers} layers, each with heads and neurons, got {found['heads']} "
                f"keys of heads and {found['neurons']} of neurons among {len(keys)}: measure it on the same model."
            )


def choose_unit_counts(
    scores: Mapping[str, Tensor], latency: LatencyTable, target_speedup: float, multiple_of: int = 16
) -> dict[str, int]:
    """The counts of heads and neurons per layer that keep the most score in `1 / target_speedup` of the dense time.

    A layer that keeps c units keeps its c highest scores. Their worth is the sum of these scores divided by the sum of
    all scores of that kind in the model, so that all heads together weigh as much as all neurons together, however
    many there are; negative scores count as 0. Scores are not shifted: where coefficients have hardly moved from 1,
    all units are worth nearly the same, and the choice keeps the kind that is cheaper nearly whole and empties the
    other to its smallest. To weigh differences, subtract the score of a worthless unit, as the lowest of its kind.

    The multiple-choice knapsack problem is solved by dynamic programming, see `choose_counts`. EarlyBERT has no such
    target; it prunes a fraction of the heads per layer and one of the neurons globally.

    Args:
        scores: 1-D floating tensors by unit key, higher = more important; every layer's heads and neurons.
        latency: of the same model on the machine to be fast on.
        target_speedup: dense time / time of the cut model, above 1.
        multiple_of: neurons stay in multiples of this, or all of them. Every layer keeps at least one such block and
            one head.

    Returns:
        how many units to keep, by unit key in the order of `scores`. `latency.predicted` of it is at most
        `latency.dense / target_speedup`.

    Raises:
        ValueError: a number out of its range, scores of another model than the table, or a target that the smallest
            layers do not reach.
    """
    if not target_speedup > 1:
        raise ValueError(f"`target_speedup` must be above 1, got {target_speedup}: 2.0 halves the time of a step.")
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be at least 1, got {multiple_of}: 1 allows every number of neurons.")
    _check_scores(scores, latency)
    options = {key: _options(key, len(score), multiple_of) for key, score in scores.items()}
    costs = [[latency._seconds(key, count) for count in counts] for key, counts in options.items()]
    budget = latency.dense / target_speedup - latency.fixed
    _check_reachable(target_speedup, latency, math.fsum(group[0] for group in costs), budget)
    kept = _kept_scores(scores)
    values = [[kept[key][count - 1] for count in counts] for key, counts in options.items()]
    chosen = choose_counts(values, costs, budget, RESOLUTION)
    return {key: counts[option] for (key, counts), option in zip(options.items(), chosen, strict=True)}


def _options(key: str, width: int, multiple_of: int) -> list[int]:
    block = 1 if _kind(key) == "heads" else multiple_of
    return [*range(block, width, block), width]


def _kept_scores(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """By key: the share of all scores of its kind that a layer keeps with its best 1, 2, ... units."""
    ordered = {key: score.detach().double().clamp(min=0).sort(descending=True).values for key, score in scores.items()}
    totals = {"heads": 0.0, "neurons": 0.0}
    for key, score in ordered.items():
        totals[_kind(key)] += float(score.sum())
    # A kind without any positive score is worth nothing, whatever stays of it.
    return {key: list(accumulate((score / (totals[_kind(key)] or 1.0)).tolist())) for key, score in ordered.items()}


def _check_scores(scores: Mapping[str, Tensor], latency: LatencyTable) -> None:
    latency._check_units(scores)
    for key, score in scores.items():
        if score.ndim != 1 or len(score) != latency._width(key) or not score.is_floating_point():
            raise ValueError(
                f"`{key}` must have {latency._width(key)} floating scores as in the latency table, got {score.dtype} "
                f"of shape {tuple(score.shape)}: measure the table on the same model."
            )
        if not torch.isfinite(score).all():
            raise ValueError(f"Scores must be finite, got NaN or infinity in `{key}`: lower the learning rate.")


def _check_reachable(target: float, latency: LatencyTable, smallest: float, budget: float) -> None:
    if smallest <= budget:
        return
    largest = latency.dense / (latency.fixed + smallest) if latency.fixed + smallest else math.inf
    raise ValueError(
        f"`target_speedup={target}` cannot be reached: with one head and one block of neurons in every layer the "
        f"model is {math.floor(largest * 1000) / 1000} times as fast for {latency.what} on {latency.device}. Lower it."
    )


def _kind(key: str) -> str:
    return key.rpartition(".")[2]


def _problem(table: LatencyTable) -> str | None:
    """What no measurement can have given; None if there is nothing of it."""
    for name in ("heads", "neurons"):
        column = getattr(table, name)
        if not (isinstance(column, tuple) and column and all(map(_is_seconds, column)) and _is_ascending(column)):
            return f"`{name}` must be ascending seconds, got {reprlib.repr(column)}"
    counts = table.neuron_counts
    if not (isinstance(counts, tuple) and all(map(_is_count, counts)) and len(counts) == len(table.neurons)):
        return f"`neuron_counts` must be one count for each of `neurons`, got {reprlib.repr(counts)}"
    if not _is_ascending(counts) or len(set(counts)) < len(counts):
        return f"`neuron_counts` must be ascending, got {reprlib.repr(counts)}"
    for name in ("fixed", "dense"):
        if not _is_seconds(getattr(table, name)) or (name == "dense" and not table.dense):
            return f"`{name}` must be seconds, got {reprlib.repr(getattr(table, name))}"
    for name in ("layers", "batch", "length", "threads"):
        if not _is_count(getattr(table, name)):
            return f"`{name}` must be a positive whole number, got {reprlib.repr(getattr(table, name))}"
    if table.what not in PURPOSES:
        return f"`what` must be one of {', '.join(map(repr, PURPOSES))}, got {reprlib.repr(table.what)}"
    return None if isinstance(table.device, str) else f"`device` must be a name, got {reprlib.repr(table.device)}"


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LONGEST


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_ascending(values: tuple) -> bool:
    return all(low <= high for low, high in zip(values, values[1:], strict=False))
