"""What does a sparse training hold on each rank, and what do ranks send to change a mask?

Arithmetic on shapes, by the rules of what it speaks of: how FSDP2 and ZeRO cut tensors, what the mask keeper holds,
and what a selection adds up. `benchmarks/memory_plan.py` puts it beside two processes that train.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from torch import nn

from sparse_hf.algorithms.selection_sums import COUNT, bytes_of_selection
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import Site, find_sites
from sparse_hf.tickets.config_checks import check_choice
from sparse_hf.tickets.configs import Budget


Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "bf16"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

FP32 = 4
MOMENTS = 2 * FP32  # of Adam, in every strategy
BITS = 1  # a mask while it is in use, a byte per weight


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest rank, without activations and communication buffers (but DDP's, which hold all gradients).

    Attributes:
        weights: what the model computes with; of FSDP2 and ZeRO-3 this rank's part.
        gradients: the most that is there at once, in the backward pass or in the optimizer's step.
        optimizer: Adam's moments, and under ZeRO the fp32 masters.
        masks: of the weights that this rank steps, a byte each.
        mask_update: what is there beside, while new masks are drawn from old ones: their copy and the new ones.
        sums_sent: by this rank to draw masks once: an all-reduce in a ring sends 2 (n - 1) / n of what is added up.
        weights_sent: by this rank once masks are new: ZeRO-1 and 2 then share weights as after a step.
        gather_instead: what this rank would receive if it had to see all prunable weights in fp32; it never does.
    """

    strategy: Strategy
    processes: int
    precision: Precision
    weights: int
    gradients: int
    optimizer: int
    masks: int
    mask_update: int
    sums_sent: int
    weights_sent: int
    gather_instead: int

    @property
    def total(self) -> int:
        """Bytes held between two changes of masks, at the moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.masks

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "total": self.total}


def plan_memory(
    model: nn.Module,
    strategy: Strategy,
    processes: int,
    *,
    precision: Precision = "bf16",
    budget: Budget = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> MemoryPlan:
    """What training `model` under a growing sparsity by magnitude takes on each of `processes` ranks.

    Args:
        model: may lie on the meta device, since only shapes are read. All its parameters are trained, by Adam.
        strategy: as `recipes/launch/<strategy>.yaml` sets it up, on one flat group of ranks.
        processes: at least 1.
        precision: of the Trainer. "bf16" is mixed: weights that are stepped are fp32 everywhere; ZeRO computes with
            bf16 copies of them.
        budget, include, exclude: of the `GradualPruningConfig`.

    Raises:
        ValueError: an unknown choice, no process, or patterns that match nothing.
    """
    check_choice("strategy", strategy, Strategy)
    check_choice("precision", precision, Precision)
    check_choice("budget", budget, Budget)
    if processes < 1:
        raise ValueError(f"`processes` must be at least 1, got {processes}.")
    sites = find_sites(model, include, exclude)
    parameters = named_canonical_parameters(model)
    masked = {name: parameters[name] for name in dict.fromkeys(site.parameter for site in sites)}
    everything, here = _numel(parameters), _held(parameters, strategy, processes)
    # Under ZeRO-1 and 2 a rank's run may be all masked.
    masks_here = min(here, _numel(masked)) if strategy in ("zero1", "zero2") else _held(masked, strategy, processes)
    computing = FP32 if precision == "fp32" or strategy in ("ddp", "fsdp2") else 2
    by_strategy = {  # (weights, gradients) in bytes on this rank
        "ddp": (FP32 * everything, 2 * FP32 * everything),  # .grad and the buckets in which gradients are added up
        "fsdp2": (FP32 * here, FP32 * here),
        # Whole ones at the end of the backward pass; in the step this rank's part, with an fp32 copy.
        "zero1": (computing * everything, max(computing * everything, (computing + FP32) * here)),
        "zero2": (computing * everything, (computing + FP32) * here),
        "zero3": (computing * here, (computing + FP32) * here),
    }
    weights, gradients = by_strategy[strategy]
    masters = FP32 if strategy.startswith("zero") else 0
    others = (processes - 1) / processes
    return MemoryPlan(
        strategy=strategy,
        processes=processes,
        precision=precision,
        weights=weights,
        gradients=gradients,
        optimizer=(MOMENTS + masters) * here,
        masks=BITS * masks_here,
        mask_update=2 * BITS * masks_here,
        sums_sent=0 if strategy == "ddp" else round(2 * others * _sums(sites, budget)),
        weights_sent=round(others * computing * everything) if strategy in ("zero1", "zero2") else 0,
        gather_instead=round(others * FP32 * _numel(masked)),
    )


def _numel(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _held(parameters: Mapping[str, nn.Parameter], strategy: Strategy, processes: int) -> int:
    """Weights on the rank that steps most of them."""
    if strategy == "ddp":
        return _numel(parameters)
    if strategy == "fsdp2":  # whole rows
        shapes = [parameter.shape or (1,) for parameter in parameters.values()]  # a scalar, as CLIP has one, is a row
        return sum(-(-shape[0] // processes) * math.prod(shape[1:]) for shape in shapes)
    if strategy == "zero3":  # a run of each
        return sum(-(-parameter.numel() // processes) for parameter in parameters.values())
    return -(-_numel(parameters) // processes)  # a run of all of them together


def _sums(sites: Sequence[Site], budget: Budget) -> int:
    """Bytes added up over ranks for one draw, and to know the sparsity that was reached."""
    numels = [math.prod(site.shape) for site in sites]
    draws = [numels] if budget == "global" else [[numel] for numel in numels]
    # Matrix by matrix, candidates are counted first; layer collapse is looked for in any case.
    counts = (1 if budget == "global" else 2) * len(sites) + 1
    return sum(map(bytes_of_selection, draws)) + COUNT * counts
