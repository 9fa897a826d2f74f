"""What a user can ask of load balancing in training."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args


Gradient = Literal["routers", "network"]


@dataclass(frozen=True)
class BalanceConfig:
    """A load-balancing loss for `SparseTrainer(balance=...)` that is the same however the batch is split.

    Per layer `coefficient` times Switch's loss, experts * sum_i f_i P_i (1 at even load for every top_k), added up
    over layers; f and P are over all tokens of an optimizer step: all its micro-batches on all ranks, without padding.
    A coefficient of Transformers' own loss, which is top_k times as large, pools layers, and grows with accumulation
    and ranks there, times top_k / layers gives about the same pressure per layer.

    What is exact: both `gradient`s are equal, to rounding, for every split of the same tokens into micro-batches and
    ranks, and under gradient checkpointing. What differs from Switch: `gradient="routers"` stops at each layer's
    router, where Switch's flows on into all layers below.
    """

    coefficient: float = field(default=0.01, metadata={"help": "Of each layer's balance loss; 0 only measures."})
    z: float = field(default=0.0, metadata={"help": "Of each layer's router z-loss (ST-MoE took 0.001)."})
    gradient: Gradient = field(
        default="routers",
        metadata={
            "help": "What the loss trains: the routers alone, which keeps their inputs until the end of a step, or "
            "the network with them, as published, which under accumulation costs one more forward pass."
        },
    )

    def __post_init__(self) -> None:
        for name in ("coefficient", "z"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be 0 or more, got {value!r}.")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"Unknown gradient {self.gradient!r}. Choose one of: {', '.join(get_args(Gradient))}.")
