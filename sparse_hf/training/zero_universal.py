"""What has to be put right after DeepSpeed has read ZeRO-3's state in its universal format?

That format lets a run go on with another number of processes. DeepSpeed 0.19.8 reads weights and moments of ZeRO-3
rightly, but lets all parts of its torch optimizer share one count of steps, which then grows by one for each of them,
and gives all groups of parameters the options of the first (weight decay, learning rate).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TrainingArguments

from sparse_hf.training.zero_stepping import innermost


def reads_universal(args: TrainingArguments) -> bool:
    """Whether DeepSpeed is told to read that format into ZeRO-3."""
    config = args.hf_deepspeed_config if args.deepspeed is not None else None
    return config is not None and config.is_zero3() and bool(config.get_value("checkpoint.load_universal"))


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """What each group of the torch optimizer inside is told about its parameters, by name."""
    groups = innermost(optimizer)[0].param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def put_right(optimizer: torch.optim.Optimizer, options: Sequence[dict[str, object]]) -> None:
    """Give what is stepped by itself a count of steps of its own, and each group its options again.

    The learning rate stays where the schedule was, in proportion to the one with which the group began.

    Args:
        optimizer: the Trainer's, after DeepSpeed has loaded its state.
        options: `options_of` it before that.
    """
    inner = innermost(optimizer)[0]
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, told in zip(inner.param_groups, options, strict=True):
        began, now = group.get("initial_lr"), group["lr"]
        group.update(told)
        group["lr"] = now * (told["initial_lr"] / began) if began and told["initial_lr"] != began else now


def check_steps_apart(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to train on with what DeepSpeed has left, where nobody has put it right.

    Raises:
        ValueError: two masters share one count of steps.
    """
    inner, zero = innermost(optimizer)
    if zero is None:
        return
    counts = [state["step"].data_ptr() for state in inner.state.values() if isinstance(state.get("step"), Tensor)]
    if len(set(counts)) < len(counts):
        raise ValueError(
            "Each of ZeRO-3's masters needs its own count of steps, but DeepSpeed has read one for all from its "
            "universal format. Resume by `SparseTrainer`, which puts that right."
        )
