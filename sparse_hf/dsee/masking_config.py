"""When and by what does S1 remove frozen weights from a model that is being tuned?"""

from dataclasses import dataclass, field
from typing import Literal


Score = Literal["update", "weight_and_update", "weight"]
SCORE_HELP = (
    "What ranks the tuned matrices' weights: the size of their update (the paper's), |W0| + |update|, or |W0|. "
    "Matrices that are only masked are ranked by |W0|."
)
SPARSITY_HELP = "Share of the frozen weights that S1 removes, of the tuned and of the other masked matrices each."


@dataclass(frozen=True)
class DseeMaskingConfig:
    """S1 within one training, for `DseeMaskingCallback`: at one step, or gradually (cubic, Zhu and Gupta 2017).

    Raises:
        ValueError: a value out of its range.
    """

    sparsity: float = field(default=0.5, metadata={"help": SPARSITY_HELP})
    start_step: int = field(default=0, metadata={"help": "Optimizer step after which weights are removed."})
    end_step: int | None = field(
        default=None, metadata={"help": "Optimizer step at which `sparsity` is reached (default: `start_step`)."}
    )
    every: int = field(default=10, metadata={"help": "Optimizer steps between two gradual masks."})
    score: Score = field(default="update", metadata={"help": SCORE_HELP})

    def __post_init__(self) -> None:
        _check(self)
        if self.start_step < 0 or self.every < 1:
            raise ValueError(
                f"`start_step` must be at least 0 and `every` at least 1, got {self.start_step} and {self.every}."
            )
        if self.end_step is not None and self.end_step < self.start_step:
            raise ValueError(f"`end_step` must not be before `start_step` ({self.start_step}), got {self.end_step}.")


@dataclass(frozen=True)
class DseeTwoStageConfig:
    """DSEE's two trainings in one `SparseTrainer.train()`: tune, mask by the update, tune again (Chen et al. 2023).

    The second stage goes on from the trained updates with a new optimizer and schedule, as the released scripts do.

    Raises:
        ValueError: a value out of its range.
    """

    sparsity: float = field(default=0.5, metadata={"help": SPARSITY_HELP})
    score: Score = field(default="update", metadata={"help": SCORE_HELP})
    first_epochs: float | None = field(
        default=None, metadata={"help": "Length of the first stage (default: as the second's, `num_train_epochs`)."}
    )
    first_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the first stage (default: as the second's)."}
    )

    def __post_init__(self) -> None:
        _check(self)
        for name in ("first_epochs", "first_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")


def _check(config: DseeMaskingConfig | DseeTwoStageConfig) -> None:
    if not 0 < config.sparsity < 1:
        raise ValueError(f"`sparsity` must be in (0, 1), got {config.sparsity!r}.")
    choices = ("update", "weight_and_update", "weight")
    if config.score not in choices:
        raise ValueError(f"`score` must be one of {', '.join(choices)}, got {config.score!r}.")
