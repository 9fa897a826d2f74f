"""When routers are trained, and how fast."""

from dataclasses import dataclass, field


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
