"""How long a model's step takes with fewer heads and neurons, measured on the machine at hand."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.units import Units, find_units, table_of
from sparse_hf.tickets.latency_steps import cut_layer, cut_model, layer_inputs, random_inputs, step_of, untouched
from sparse_hf.tickets.latency_table import PURPOSES, LatencyTable


HEAD_POINTS = 16  # up to so many heads, every count is measured
NEURON_POINTS = 13

# A measured point: ("heads", count), ("neurons", count), or ("model", one of SIZES).
Point = tuple[str, int | str]
SIZES = ("smallest", "one head", "dense")


def measure_latency(
    model: nn.Module,
    what: str = "training",
    batch: int = 8,
    length: int = 128,
    multiple_of: int = 16,
    seconds: float = 60.0,
    table: UnitTable | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> LatencyTable:
    """Measure what heads and neurons cost in this model on its device.

    Copies of the first layer are cut and timed alone, on what the layer is given in the whole model: with every number
    of heads and the smallest FFN, and with one head and several numbers of neurons. Attention and FFN run one after
    the other, so what heads and neurons add to the smallest layer adds up; beside a small rest it is also least noisy.
    The whole model is timed too: dense, with one head per layer, and with the smallest FFN besides. What all heads and
    all neurons add comes from these three, the layers say how it is spread over the counts: inside a model caches are
    colder than around one layer.

    All points take turns until the time is up, and the median of each counts. With one CPU thread it is CPU time,
    which other processes do not prolong as they do wall time; otherwise wall time. No larger count may look cheaper
    than a smaller one: the closest non-decreasing numbers are taken. The optimizer is not timed. For mixed precision
    call this inside `torch.autocast`.

    The model is as before: weights, gradients, modes, and the global random state. Call it before coefficients are
    hooked into the model. Needs the memory of one step and of about another model.

    Args:
        model: a Transformers model whose layers all have the same numbers of units.
        what: "training" (forward and backward, in training mode) or "inference" (forward, in evaluation mode).
        batch: examples per step.
        length: tokens per example.
        multiple_of: neurons per block; the smallest FFN has one block.
        seconds: the limit of the whole measurement. Each point is timed at least once, after a warm-up.
        table: of a family that is not supported.
        inputs: of the model, instead of random tokens or pixels. With `labels` its own loss is the end of the forward.

    Raises:
        ValueError: a number out of its range, layers that differ, nothing to train, or a model without a unit table.
    """
    end = time.perf_counter() + seconds
    model = unwrap(model)
    _check_request(model, what, batch, length, multiple_of, seconds)
    table = table or table_of(model)
    heads, neurons, layers = _layer_units(model, table)
    smallest = min(multiple_of, neurons.count)
    head_counts = _spread_counts(heads.count, 1, HEAD_POINTS)
    neuron_counts = _spread_counts(neurons.count, multiple_of, NEURON_POINTS)
    device = next(model.parameters()).device
    with untouched(model, device, what):
        if inputs is None:
            inputs = random_inputs(model, batch, length)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        args, kwargs = layer_inputs(model, table, inputs)
        shapes = {("heads", count): (count, smallest) for count in head_counts}
        shapes |= {("neurons", count): (1, count) for count in neuron_counts}
        steps: dict[Point, Callable[[], None]] = {}
        for point, (head_count, neuron_count) in shapes.items():
            layer = cut_layer(model, table, {heads.key: head_count, neurons.key: neuron_count})
            steps[point] = step_of(layer, args, kwargs, what)
        models = (cut_model(model, table, smallest), cut_model(model, table, neurons.count), model)
        for size, sized in zip(SIZES, models, strict=True):
            steps["model", size] = step_of(sized, (), inputs, what)
        times = _median_seconds(steps, end, device)
    seen = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return LatencyTable(
        **_columns(times, head_counts, neuron_counts, layers),
        layers=layers,
        what=what,
        batch=seen.shape[0],
        length=seen.shape[1],
        device=where,
        threads=torch.get_num_threads(),
    )


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The non-decreasing numbers with the least squared distance from `values`: isotonic regression.

    Neighbours that fall are pooled to their mean until none do (pool adjacent violators).
    """
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def _columns(
    times: Mapping[Point, float], head_counts: list[int], neuron_counts: list[int], layers: int
) -> dict[str, object]:
    """The seconds of a table from those of all points: see `measure_latency`."""
    smallest, one_head, dense = non_decreasing([times["model", size] for size in SIZES])
    heads = non_decreasing([times["heads", count] for count in head_counts])
    neurons = non_decreasing([times["neurons", count] for count in neuron_counts])
    # Only sums mean something, so it does not matter that this was measured outside the model.
    rest = min(heads[0], neurons[0], smallest / layers) / 2
    heads = [rest + rise for rise in _rises(heads, (dense - one_head) / layers)]
    neurons = [rest + rise for rise in _rises(neurons, (one_head - smallest) / layers)]
    return {
        "heads": tuple(np.interp(range(1, head_counts[-1] + 1), head_counts, heads).tolist()),
        "neuron_counts": tuple(neuron_counts),
        "neurons": tuple(neurons),
        "fixed": max(dense - layers * (heads[-1] + neurons[-1]), 0.0),
        "dense": dense,
    }


def _rises(values: Sequence[float], last: float) -> list[float]:
    """What comes to the first value, scaled so that it is `last` in the end; 0 where nothing comes to it."""
    whole = values[-1] - values[0]
    return [last * (value - values[0]) / whole if whole else 0.0 for value in values]


def _median_seconds(steps: Mapping[Point, Callable[[], None]], end: float, device: torch.device) -> dict[Point, float]:
    """Run all steps over and over until `end`; they take turns, so that a slow moment of the machine is shared."""
    for step in steps.values():
        step()  # the first call allocates
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: dict[Point, list[float]] = {point: [] for point in steps}
    round_begin = time.perf_counter()
    while True:
        for point, step in steps.items():
            _finish(device)
            begin = clock()
            step()
            _finish(device)
            times[point].append(clock() - begin)
        now = time.perf_counter()
        round_begin, round_seconds = now, now - round_begin
        if now + round_seconds > end:
            return {point: statistics.median(several) for point, several in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread_counts(count: int, block: int, most: int) -> list[int]:
    """Up to `most` multiples of `block` from one block to `count`, evenly spread, and `count` itself."""
    blocks = count // block
    if blocks > most:
        picked = {1, *(round(step * blocks / (most - 1)) for step in range(1, most))}
    else:
        picked = set(range(1, blocks + 1))
    return sorted({number * block for number in picked} | {count})


def _layer_units(model: nn.Module, table: UnitTable) -> tuple[Units, Units, int]:
    """The heads and the neurons of the first layer, which stand for those of every layer, and the number of layers."""
    units = find_units(model, table)
    for kind in ("heads", "neurons"):
        counts = {one.count for one in units if one.kind == kind}
        if len(counts) > 1:
            raise ValueError(
                f"All layers must have the same number of {kind} for one latency table, got {sorted(counts)}: "
                "measure the model before it is cut."
            )
    return units[0], units[1], len(units) // 2


def _check_request(model: nn.Module, what: str, batch: int, length: int, multiple_of: int, seconds: float) -> None:
    if what not in PURPOSES:
        raise ValueError(f"`what` must be one of {', '.join(map(repr, PURPOSES))}, got {what!r}.")
    for name, value in (("batch", batch), ("length", length), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`seconds` must be a limit of 0 or more, got {seconds}: 60 is plenty.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"`length` must be at most the {positions} positions of the model, got {length}: lower it.")
    if what == "training" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("`what='training'` needs parameters that require gradients, got none: measure 'inference'.")
