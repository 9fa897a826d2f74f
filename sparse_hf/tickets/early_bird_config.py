"""What a user can ask of an early-bird search for a structured ticket."""

import math
from dataclasses import dataclass, field
from typing import Literal

from sparse_hf.anatomy.modeling_slim import UnitTable, table_from_dict
from sparse_hf.tickets.config_checks import check_choice, check_positive, check_sparsity


Scope = Literal["layer", "global"]
Ranking = Literal["signed", "absolute"]
Moment = int | float  # a whole number of optimizer steps, or, with a decimal point, of epochs

DEFAULT_HEADS, DEFAULT_NEURONS = 1 / 3, 0.4


@dataclass(frozen=True)
class EarlyBirdConfig:
    """Draw a structured ticket early in training, cut the model, train the smaller one (EarlyBERT, Chen et al. 2021).

    Search: all weights are trained together with one coefficient per attention head and per FFN neuron, under an L1
    penalty on the coefficients. Draw: the units with the largest coefficients stay, once that choice has settled.
    Train: the smaller model starts again from the weights (head included) that the search started from.

    Defaults are those of the released EarlyBERT code, except: it draws at a fixed 0.2 of the first epoch, which is
    `draw_at=0.2` here, and leaves the mask-distance test to Early-Bird Tickets (You et al. 2020), whose rule is the
    default; it scales attention probabilities, here the context vectors are scaled, which is the same function and
    works with fused attention; its L1 penalty is part of the loss, here its gradient joins after clipping; neuron
    counts are no multiples of 16 there.
    """

    heads: float | None = field(
        default=None,
        metadata={"help": "Fraction of attention heads (key/value groups, where shared) to cut (default 1/3)."},
    )
    neurons: float | None = field(default=None, metadata={"help": "Fraction of FFN neurons to cut (default 0.4)."})
    target_speedup: float | None = field(
        default=None,
        metadata={"help": "Instead of both: how many times faster, by a latency table measured on this machine."},
    )
    speedup_of: Literal["training", "inference"] = field(
        default="training", metadata={"help": "What `target_speedup` speeds up: training steps or inference."}
    )
    latency_batch: int = field(default=8, metadata={"help": "Batch size at which latency is measured."})
    latency_length: int = field(default=128, metadata={"help": "Sequence length at which latency is measured."})
    head_scope: Scope = field(
        default="layer", metadata={"help": "Cut the same fraction per layer, or compare globally."}
    )
    neuron_scope: Scope = field(
        default="global", metadata={"help": "Cut the same fraction per layer, or compare globally."}
    )
    neuron_multiple: int = field(
        default=16, metadata={"help": "Neurons per layer are a multiple of this, since odd widths run slower."}
    )
    uniform: bool = field(
        default=False,
        metadata={"help": "Same counts in every layer, saved in the stock form; fails where it cannot be."},
    )
    ranking: Ranking = field(
        default="signed", metadata={"help": "Rank units by the coefficient (as released) or by its absolute value."}
    )
    coefficients: Literal["discard", "fold"] = field(
        default="discard",
        metadata={"help": "At the draw: forget the coefficients (as released), or multiply them into the weights."},
    )
    l1: float = field(default=1e-4, metadata={"help": "Strength of the L1 penalty on coefficients."})
    coefficient_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the coefficients (default: the training's)."}
    )
    search_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the weights in the search (default: the training's)."}
    )
    draw_at: Moment | None = field(
        default=None, metadata={"help": "Draw at this step, or (0.2) fraction of an epoch, instead of when settled."}
    )
    check_every: Moment = field(
        default=0.05, metadata={"help": "Steps, or fraction of an epoch, between two looks at the mask."}
    )
    earliest: Moment = field(
        default=0.1, metadata={"help": "Masks before this step, or fraction of an epoch, count for nothing."}
    )
    longest: Moment = field(
        default=1.0, metadata={"help": "Draw at this step, or epoch, though the mask has not settled."}
    )
    history: int = field(default=5, metadata={"help": "How many last masks must agree."})
    threshold: float = field(default=0.1, metadata={"help": "Largest mask distance between them, 0 to 1."})
    unit_table: UnitTable | None = field(
        default=None, metadata={"help": "Where heads and neurons are, for a family that is not supported."}
    )
    final_training: bool = field(
        default=True, metadata={"help": "Train the smaller model with the training arguments after the draw."}
    )

    def __post_init__(self) -> None:
        self._check_budget()
        check_choice("speedup_of", self.speedup_of, Literal["training", "inference"])
        check_choice("head_scope", self.head_scope, Scope)
        check_choice("neuron_scope", self.neuron_scope, Scope)
        check_choice("ranking", self.ranking, Ranking)
        check_choice("coefficients", self.coefficients, Literal["discard", "fold"])
        check_positive(self, "neuron_multiple", "latency_batch", "latency_length")
        check_positive(self, "coefficient_learning_rate", "search_learning_rate")
        if isinstance(self.l1, bool) or not isinstance(self.l1, (int, float)) or not 0 <= self.l1 < math.inf:
            raise ValueError(f"`l1` must be 0 or more, got {self.l1!r}.")
        for name in ("draw_at", "check_every", "earliest", "longest"):
            _check_moment(name, getattr(self, name), optional=name == "draw_at")
        if type(self.history) is not int or self.history < 2:
            raise ValueError(f"`history` must be a number of masks, 2 or more, got {self.history!r}.")
        check_sparsity("threshold", self.threshold)
        if self.unit_table is not None and not isinstance(self.unit_table, UnitTable):
            object.__setattr__(self, "unit_table", table_from_dict(self.unit_table))
        if self.uniform:
            object.__setattr__(self, "head_scope", "layer")
            object.__setattr__(self, "neuron_scope", "layer")

    def _check_budget(self) -> None:
        if self.target_speedup is None:
            for name, default in (("heads", DEFAULT_HEADS), ("neurons", DEFAULT_NEURONS)):
                value = default if getattr(self, name) is None else getattr(self, name)
                check_sparsity(name, value)
                object.__setattr__(self, name, value)
            return
        if self.heads is not None or self.neurons is not None:
            raise ValueError(
                f"Give `target_speedup`, or `heads` and `neurons`, not both, got "
                f"{self.target_speedup}, {self.heads} and {self.neurons}."
            )
        speedup = self.target_speedup
        if isinstance(speedup, bool) or not isinstance(speedup, (int, float)) or not 1 < speedup < math.inf:
            raise ValueError(f"`target_speedup` must be more than 1, got {speedup!r}.")
        if self.uniform:
            raise ValueError(
                "`target_speedup` chooses counts layer by layer, got `uniform=True`. Give `heads` and `neurons`."
            )


def steps_of(moment: Moment, steps_per_epoch: int) -> int:
    """Optimizer steps of a moment: a whole number is steps, another is epochs; at least 1."""
    return moment if isinstance(moment, int) else max(1, round(moment * steps_per_epoch))


def _check_moment(name: str, value: Moment | None, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be a number of steps (20) or of epochs (0.2, 1.0), more than 0, got {value!r}."
        )
