"""What a user can ask of the number of experts per token over a training."""

from dataclasses import dataclass, field
from typing import get_args

from sparse_hf.algorithms.top_k_schedules import Shape


@dataclass(frozen=True)
class TopKSchedule:
    """The number of experts per token over a training, for `TopKScheduleCallback`.

    SMoE-Dropout (Chen et al. 2023) is `start < end`, linear, over the whole training, with random routers that stay
    frozen; their run on enwik8 grew k from 8 to all 16 experts.
    """

    start: int = field(default=1, metadata={"help": "Experts per token at the beginning."})
    end: int | None = field(default=None, metadata={"help": "Experts per token at the end; None: all experts."})
    shape: Shape = field(default="linear", metadata={"help": "`linear`, `cosine` or `exponential`."})
    until: float = field(default=1.0, metadata={"help": "Part of the training's steps after which k is `end`."})
    freeze_routers: bool = field(default=True, metadata={"help": "Routers stay as they are, as in SMoE-Dropout."})

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (name == "end" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a number of experts, 1 or more, got {value!r}.")
        if self.shape not in get_args(Shape):
            raise ValueError(f"Unknown shape {self.shape!r}. Choose one of: {', '.join(get_args(Shape))}.")
        number = isinstance(self.until, (int, float)) and not isinstance(self.until, bool)
        if not number or not 0 < self.until <= 1:
            raise ValueError(f"`until` must be a part of the training, above 0 and at most 1, got {self.until!r}.")
