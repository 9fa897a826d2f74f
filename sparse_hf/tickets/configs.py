"""What a user can ask for: one frozen dataclass per method, checked at construction, JSON round trip."""

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from sparse_hf.algorithms.schedules import geometric_sparsity, linear_sparsity
from sparse_hf.tickets.config_checks import check_choice, check_positive, check_sparsity


Score = Literal["magnitude", "gradient", "random"]
Budget = Literal["global", "uniform", "erdos_renyi", "erdos_renyi_kernel"]
RoundSchedule = Literal["linear", "geometric"]

SCORE_HELP = "How important a weight is: |w|, |w * gradient| of the loss, or random (a control)."
BUDGET_HELP = "How much stays where: one global threshold, the same density in every matrix, or Erdős–Rényi (ER, ERK)."
REACHED = 1e-6  # how near the last round of `per_round` must come to `sparsity`

INCLUDE_HELP = "Patterns of matrices to prune instead of the default set (see `find_sites`)."
EXCLUDE_HELP = "Patterns of matrices to leave dense."


@dataclass(frozen=True)
class LotteryTicketConfig:
    """Iterative magnitude pruning with rewinding (Chen et al. 2020, https://arxiv.org/abs/2007.12223).

    Each round starts from the rewound weights under the current mask, trains, and prunes to the next sparsity. The
    defaults follow the released code where it differs from the paper: equal steps of the original count per round, and
    the task head keeps its trained weights between rounds. Unlike that code, the schedule ends at `sparsity`, never at
    100 %, the learning rate decays to its end in every round, and the final training starts from the head's first
    state.
    """

    sparsity: float = field(default=0.6, metadata={"help": "Fraction of prunable weights that are zero in the end."})
    rounds: int | None = field(default=None, metadata={"help": "Number of train-and-prune rounds (default 6)."})
    per_round: float | None = field(
        default=None,
        metadata={"help": "Instead of `rounds`: the fraction pruned per round, of the original (linear) or the rest."},
    )
    schedule: RoundSchedule = field(
        default="linear",
        metadata={"help": "linear: 10, 20, 30 % of the original weights; geometric: 20 % of what remains."},
    )
    score: Score = field(default="magnitude", metadata={"help": SCORE_HELP})
    budget: Budget = field(default="global", metadata={"help": BUDGET_HELP})
    rewind_step: int = field(
        default=0, metadata={"help": "Optimizer step of the dense round to rewind to; 0 is the pretrained weights."}
    )
    rewind_head: bool = field(
        default=False, metadata={"help": "Reset the task head at each round too; the released code keeps it trained."}
    )
    round_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps per round (default: as long as the final training)."}
    )
    round_epochs: float | None = field(default=None, metadata={"help": "Length of a round in epochs instead."})
    final_training: bool = field(
        default=True, metadata={"help": "Train the rewound ticket with the training arguments after the search."}
    )
    score_batches: int = field(
        default=8, metadata={"help": "Training batches over which the gradient is averaged for score='gradient'."}
    )
    include: tuple[str, ...] | None = field(default=None, metadata={"help": INCLUDE_HELP})
    exclude: tuple[str, ...] | None = field(default=None, metadata={"help": EXCLUDE_HELP})
    seed: int = field(default=0, metadata={"help": "Seed of score='random'."})

    def __post_init__(self) -> None:
        _check_common(self)
        check_choice("schedule", self.schedule, RoundSchedule)
        check_positive(self, "rounds", "round_steps", "round_epochs", "score_batches")
        if self.round_steps is not None and self.round_epochs is not None:
            raise ValueError(
                f"Give `round_steps` or `round_epochs`, not both, got {self.round_steps} and {self.round_epochs}."
            )
        if type(self.rewind_step) is not int or self.rewind_step < 0:
            raise ValueError(f"`rewind_step` must be an optimizer step, 0 or more, got {self.rewind_step!r}.")
        if self.round_steps is not None and self.rewind_step >= self.round_steps:
            raise ValueError(
                f"`rewind_step` must lie inside the first round of {self.round_steps} steps, got {self.rewind_step}."
            )
        # Both may be there when they agree: then this is a copy of a config, made by `replace` or read from a file.
        rounds = self.rounds or 6 if self.per_round is None else _rounds_of_fraction(self)
        if self.rounds not in (None, rounds):
            raise ValueError(
                f"Give `rounds` or `per_round`, not both, got rounds={self.rounds} and per_round={self.per_round}."
            )
        object.__setattr__(self, "rounds", rounds)

    def sparsities(self) -> list[float]:
        """The sparsity after each round, rising to `sparsity`."""
        schedule = linear_sparsity if self.schedule == "linear" else geometric_sparsity
        return [schedule(round, self.rounds, self.sparsity) for round in range(1, self.rounds + 1)]


@dataclass(frozen=True)
class GradualPruningConfig:
    """Prune while training, fast at first, then slowly (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878).

    Masks are nested: unlike the paper's, a pruned weight stays pruned.
    """

    sparsity: float = field(default=0.6, metadata={"help": "Fraction of prunable weights that are zero in the end."})
    initial_sparsity: float = field(default=0.0, metadata={"help": "Sparsity at `start_step`."})
    start_step: int = field(default=0, metadata={"help": "Optimizer step after which pruning begins."})
    end_step: int | None = field(
        default=None,
        metadata={"help": "Optimizer step at which `sparsity` is reached (default: 2/3 of the training)."},
    )
    every: int = field(default=10, metadata={"help": "Optimizer steps between two mask updates."})
    score: Score = field(default="magnitude", metadata={"help": SCORE_HELP})
    budget: Budget = field(default="global", metadata={"help": BUDGET_HELP})
    include: tuple[str, ...] | None = field(default=None, metadata={"help": INCLUDE_HELP})
    exclude: tuple[str, ...] | None = field(default=None, metadata={"help": EXCLUDE_HELP})
    seed: int = field(default=0, metadata={"help": "Seed of score='random'."})

    def __post_init__(self) -> None:
        _check_common(self)
        check_positive(self, "end_step", "every")
        check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"`initial_sparsity` must be at most `sparsity` ({self.sparsity}), got {self.initial_sparsity}."
            )
        if type(self.start_step) is not int or self.start_step < 0:
            raise ValueError(f"`start_step` must be an optimizer step, 0 or more, got {self.start_step!r}.")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"`end_step` must come after `start_step` ({self.start_step}), got {self.end_step}.")


@dataclass(frozen=True)
class StaticSparsityConfig:
    """One fixed mask for the whole training: a ticket, or one drawn from the weights before the first step."""

    ticket: str | None = field(default=None, metadata={"help": "Folder or Hub id of a ticket to train under."})
    sparsity: float | None = field(
        default=None, metadata={"help": "Instead of a ticket: prune once to this sparsity."}
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a ticket that was found on other base weights than the model's."}
    )
    score: Score = field(default="magnitude", metadata={"help": SCORE_HELP})
    budget: Budget = field(default="global", metadata={"help": BUDGET_HELP})
    score_batches: int = field(
        default=8, metadata={"help": "Training batches over which the gradient is averaged for score='gradient'."}
    )
    include: tuple[str, ...] | None = field(default=None, metadata={"help": INCLUDE_HELP})
    exclude: tuple[str, ...] | None = field(default=None, metadata={"help": EXCLUDE_HELP})
    seed: int = field(default=0, metadata={"help": "Seed of score='random'."})

    def __post_init__(self) -> None:
        if (self.ticket is None) == (self.sparsity is None):
            raise ValueError(
                f"Give either `ticket` or `sparsity`, got ticket={self.ticket!r}, sparsity={self.sparsity!r}."
            )
        if isinstance(self.ticket, os.PathLike):
            object.__setattr__(self, "ticket", os.fspath(self.ticket))
        if self.ticket is not None and not isinstance(self.ticket, str):
            raise ValueError(
                f"`ticket` must be a folder or a Hub id, got a {type(self.ticket).__name__}. "
                "Pass a ticket in memory as `sparsity=ticket` instead of a config."
            )
        check_positive(self, "score_batches")
        _check_common(self)


def _rounds_of_fraction(config: LotteryTicketConfig) -> int:
    """How many rounds of `per_round` reach `sparsity`."""
    fraction, sparsity = config.per_round, config.sparsity
    check_sparsity("per_round", fraction)
    if fraction == 0:
        raise ValueError("`per_round` must be more than 0, got 0. It is the fraction of weights pruned in a round.")
    linear = config.schedule == "linear"
    rounds = sparsity / fraction if linear else math.log1p(-sparsity) / math.log1p(-fraction)
    reached = {n: n * fraction if linear else 1 - (1 - fraction) ** n for n in (math.floor(rounds), math.ceil(rounds))}
    for number, value in reached.items():
        if abs(value - sparsity) <= REACHED:
            return max(1, number)
    choices = " or ".join(f"{value:.7g}" for value in reached.values() if 0 < value < 1)
    raise ValueError(
        f"Rounds of `per_round`={fraction} ({config.schedule}) must reach `sparsity` exactly, got {sparsity}. "
        f"Take sparsity {choices}, or give `rounds` instead."
    )


def _check_common(config: object) -> None:
    if type(config) is not StaticSparsityConfig or config.ticket is None:
        check_sparsity("sparsity", config.sparsity)
    check_choice("score", config.score, Score)
    check_choice("budget", config.budget, Budget)
    if type(config.seed) is not int:
        raise ValueError(f"`seed` must be a whole number, got {config.seed!r}.")
    for name in ("include", "exclude"):
        patterns = getattr(config, name)
        if patterns is None:
            continue
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"`{name}` must be a pattern or a list of patterns, got {patterns!r}.")
        object.__setattr__(config, name, tuple(patterns))
