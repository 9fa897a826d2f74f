"""Routers that are not trained, or slower than the rest, for some steps of a Trainer run.

The optimizer knows all parameters from the beginning. A parameter whose `grad` is None is passed over by torch's
optimizers: no weight decay, no momentum, no count of steps; a gradient of zero would get all three. So freezing is
`requires_grad_(False)` and no gradient, and a router that is trained later begins with fresh moments.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.moe.router_logits import ROUTER_NAMES, RouterReader
from sparse_hf.moe.router_schedule import RouterSchedule
from sparse_hf.training.sharding_checks import check_not_sharded


def trained_router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of all routers of a mixture of experts that are trained at present.

    Raises:
        ValueError: not a family whose routers can be read.
    """
    reader = RouterReader(model)
    reader.detach()
    children = [dict(model.get_submodule(name).named_children()) for name in reader.names]
    routers = [block[name] for block in children for name in ROUTER_NAMES if name in block]
    return [one for router in routers for one in router.parameters() if one.requires_grad]


def set_frozen(parameters: Iterable[nn.Parameter], frozen: bool) -> None:
    """Freeze parameters, or train them again."""
    for one in parameters:
        one.requires_grad_(not frozen)
        if frozen:
            one.grad = None


def check_freezing(args: TrainingArguments) -> None:
    """Raise ValueError where freezing parameters of a model that is already wrapped goes wrong."""
    if args.fsdp or args.deepspeed:
        raise ValueError("Routers are frozen on one device or under DDP, got FSDP or DeepSpeed: freeze them yourself.")
    if args.world_size > 1 and args.gradient_checkpointing and not args.ddp_find_unused_parameters:
        raise ValueError(
            "Under DDP with gradient checkpointing, freezing routers needs `ddp_find_unused_parameters=True`, because "
            "DDP expects gradients of all that was trained when it began. Set it."
        )


class RouterScheduleCallback(TrainerCallback):
    """Freezes routers or warms them up by a `RouterSchedule`: `Trainer(..., callbacks=[RouterScheduleCallback(...)])`.

    Warm-up scales what the optimizer's step does to routers, weight decay included. That is a smaller learning rate
    for every rule whose step is proportional to it, as those of SGD and AdamW are; no parameter group is needed. All
    depends on the number of the step alone, so a resumed training continues as if it had not stopped. Routers that
    are frozen when training begins stay so; afterwards all are as they were.
    """

    def __init__(self, schedule: RouterSchedule) -> None:
        if not isinstance(schedule, RouterSchedule):
            raise TypeError(f"`schedule` must be a RouterSchedule, got {type(schedule).__name__}.")
        self.schedule = schedule
        self._routers: list[nn.Parameter] = []
        self._before: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Find the routers, and freeze them if the schedule begins so."""
        check_freezing(args)
        check_not_sharded(model, "Freezing routers")  # what `accelerate launch` sets does not show in `args`
        set_frozen(self._routers, False)  # a batch-size search starts training again in the same run
        self._routers = trained_router_parameters(model)
        if not self._routers:
            raise ValueError("A `RouterSchedule` must have routers to train or freeze, but all are frozen. Drop it.")
        set_frozen(self._routers, self.schedule.frozen_at(state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the routers' weights, where the coming step is to move them less than the optimizer does."""
        slow = not self.schedule.frozen_at(state.global_step) and self.schedule.rate_at(state.global_step) < 1
        self._before = [one.detach().clone() for one in self._routers] if slow else []

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take back a part of the step."""
        rate = self.schedule.rate_at(state.global_step)
        for router, before in zip(self._routers if self._before else (), self._before, strict=True):
            router.copy_(torch.lerp(before, router, rate))
        self._before = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Freeze or unfreeze for the next step."""
        set_frozen(self._routers, self.schedule.frozen_at(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let routers be trained as before."""
        set_frozen(self._routers, False)
        self._routers = []
