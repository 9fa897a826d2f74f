"""What a user can ask of load balancing in training."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args


Gradient = Literal["routers", "network"]


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing for `SparseTrainer(balance=...)` that is the same however the batch is split.

    Per layer `coefficient` times Switch's loss, experts * sum_i f_i P_i (1 at even load for every top_k), added up
    over layers; f and P are over all tokens of an optimizer step: all its micro-batches on all ranks, without padding.
    A coefficient of Transformers' own loss, which is top_k times as large, pools layers, and grows with accumulation
    and ranks there, times top_k / layers gives about the same pressure per layer.

    What is exact: both `gradient`s are equal, to rounding, for every split of the same tokens into micro-batches and
    ranks, and under gradient checkpointing. What differs from Switch: `gradient="routers"` stops at each layer's
    router, where Switch's flows on into all layers below.

    Everything else is off by default: other losses, of the same exactness, and DeepSeek's bias, which balances without
    any (`BalanceConfig(coefficient=0, bias_rate=0.001)`).
    """

    coefficient: float = field(default=0.01, metadata={"help": "Of each layer's balance loss; 0 only measures."})
    z: float = field(default=0.0, metadata={"help": "Of each layer's router z-loss (ST-MoE took 0.001)."})
    gradient: Gradient = field(
        default="routers",
        metadata={
            "help": "What the losses train: the routers alone, which keeps their inputs until the end of a step, or "
            "the network with them, as published, which under accumulation costs one more forward pass."
        },
    )
    sequence: float = field(
        default=0.0, metadata={"help": "Of each layer's balance loss within sequences, their mean (DeepSeek-V3)."}
    )
    device: float = field(
        default=0.0, metadata={"help": "Of each layer's balance loss over groups of experts (DeepSeek-V2's devices)."}
    )
    device_groups: int = field(default=1, metadata={"help": "For `device`: groups of as many successive experts."})
    entropy: float = field(
        default=0.0,
        metadata={
            "help": "Of the mean entropy of tokens' probabilities over ln(experts): above 0 tokens become sure of "
            "their experts, below 0 undecided."
        },
    )
    bias_rate: float = field(
        default=0.0,
        metadata={
            "help": "What the bias of the choice of each expert moves after an optimizer step, down if its load was "
            "above the mean, else up (arXiv 2408.15664 took 0.001); for families that have this bias."
        },
    )
    float32_routers: bool = field(
        default=False, metadata={"help": "Compute logits in float32 in training, whatever the model computes in."}
    )

    def __post_init__(self) -> None:
        for name in ("coefficient", "z", "sequence", "device", "bias_rate"):
            if not _is_number(value := getattr(self, name)) or value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value!r}.")
        if not _is_number(self.entropy):
            raise ValueError(f"`entropy` must be a finite number, got {self.entropy!r}.")
        if type(self.device_groups) is not int or (self.device_groups < 2) != (self.device == 0):
            raise ValueError(
                "`device_groups` must be a whole number, 2 or more with `device` and 1 without, got "
                f"{self.device_groups!r} with `device`={self.device}."
            )
        if type(self.float32_routers) is not bool:
            raise ValueError(f"`float32_routers` must be True or False, got {self.float32_routers!r}.")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"Unknown gradient {self.gradient!r}. Choose one of: {', '.join(get_args(Gradient))}.")

    @property
    def has_losses(self) -> bool:
        """Whether there is any gradient; otherwise load is measured, and biases may move."""
        return any((self.coefficient, self.z, self.sequence, self.device, self.entropy))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
