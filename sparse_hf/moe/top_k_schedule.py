"""What a user can ask of the number of experts per token, and of routers, over a training."""

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


@dataclass(frozen=True)
class RouterSchedule:
    """When routers are trained, and how fast, for `RouterScheduleCallback`; in optimizer steps.

    `RouterSchedule(frozen_from=0)` freezes them throughout, as X-MoE does in fine-tuning.
    """

    frozen_until: int = field(default=0, metadata={"help": "First step that trains routers."})
    warm_up_steps: int = field(
        default=0,
        metadata={"help": "Steps from there, over which the routers' learning rate rises linearly to the others'."},
    )
    frozen_from: int | None = field(default=None, metadata={"help": "From this step on they are frozen for good."})

    def __post_init__(self) -> None:
        for name in ("frozen_until", "warm_up_steps", "frozen_from"):
            value = getattr(self, name)
            if not (name == "frozen_from" and value is None) and (type(value) is not int or value < 0):
                raise ValueError(f"`{name}` must be a number of steps, 0 or more, got {value!r}.")
        if not (self.frozen_until or self.warm_up_steps or self.frozen_from is not None):
            raise ValueError(
                "A `RouterSchedule` must freeze or warm up, got neither. Set one of its steps, or use none."
            )

    def frozen_at(self, step: int) -> bool:
        """Whether the step with this number (0 is the first) leaves routers as they are."""
        return step < self.frozen_until or (self.frozen_from is not None and step >= self.frozen_from)

    def rate_at(self, step: int) -> float:
        """The routers' part of the learning rate in the step with this number, above 0 and at most 1."""
        return min(1.0, (step - self.frozen_until + 1) / (self.warm_up_steps + 1))
