"""The load-balancing loss of one optimizer step, whatever micro-batches and ranks it is split into.

For a layer the loss is experts * sum_i f_i P_i: f needs the choices of the whole step, and P's gradient at a token
needs f. Two ways, by `BalanceConfig.gradient`, neither of which depends on the split:

- `"routers"`: the routers' inputs and logits are kept, and the last micro-batch's backward pass brings the gradient of
  all of them to the routers' weights, which are linear maps.
- `"network"`: counts first. Without accumulation f is known after the forward pass; with it, all micro-batches run
  forward once more, without gradients and with the random numbers that they will have, before the first one trains.

The term joins right before the backward pass, when the Trainer has scaled its loss for accumulation and ranks, so it
depends on none of this, and the loss that the Trainer logs stays the task's. Per step there are two small reductions
over ranks, and the device is never waited for but once, in the first step. FSDP2 and ZeRO bring the gradients of the
term to their parts of the weights as they bring all others: see `router_weights.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.balance import chosen_fractions, probability_sums, switch_loss
from sparse_hf.algorithms.expert_load import expert_load, variation_by_chance
from sparse_hf.algorithms.sharded_tensors import is_sharded
from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.moe.balance_objective import MicroBatch, Totals, losses_by_layer, micro_batch, weighted
from sparse_hf.moe.counted_tokens import counted_tokens
from sparse_hf.moe.float32_routers import Float32Routers
from sparse_hf.moe.own_balance_loss import turn_off_own_balance_loss
from sparse_hf.moe.router_logits import RouterReader, Routing, check_linear
from sparse_hf.moe.router_weights import Linear, Place, RouterWeights, zero_with
from sparse_hf.moe.selection_bias import hold_in_float32, move_selection_biases, selection_biases
from sparse_hf.moe.sequence_numbers import sequence_numbers
from sparse_hf.training.sharding_checks import check_best_model


TRIED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


@dataclass
class Step:
    """What is known of the running optimizer step."""

    batches: list[Mapping[str, object]] = field(default_factory=list)
    seen: int = 0
    kept: list[MicroBatch] = field(default_factory=list)
    own: Tensor | int = 0  # `MicroBatch.totals` of this rank so far
    totals: Totals | None = None  # of all ranks and micro-batches, once known
    sums: Tensor | float = 0.0  # of probabilities on this rank so far, (layers, experts), where load is only measured
    losses: dict[str, Tensor] = field(default_factory=dict)  # this rank's part so far, each (layers,)


class LoadBalancer(TrainerCallback):
    """Adds the loss of a `BalanceConfig` to the training of a `SparseTrainer` and measures expert load."""

    def __init__(self, trainer: Trainer, config: BalanceConfig) -> None:
        """
        Raises:
            ValueError: the model or the surroundings are not such that the loss can be right, see `check_model`.
        """
        if not isinstance(config, BalanceConfig):
            raise TypeError(f"`balance` must be a BalanceConfig, got {type(config).__name__}.")
        self.trainer, self.config = trainer, config
        self.reader: RouterReader | None = None
        self._current: MicroBatch | None = None
        self._step = Step()
        self._checked = False
        self._last: tuple[Totals, dict[str, Tensor], int] | None = None  # totals and losses of a step, top_k
        self._biases: list[Tensor] = []
        self._float32: Float32Routers | None = None
        self._weights: RouterWeights | None = None  # where ranks hold parts of them
        self._places: list[Place | None] = []  # of the last forward pass
        self._check_surroundings()
        if trainer.model_init is None:
            turn_off_own_balance_loss(trainer.model)
            self.check_model(trainer.model, reader := RouterReader(trainer.model))
            reader.detach()

    def check_model(self, model: nn.Module, reader: RouterReader) -> None:
        """Raise ValueError if the loss would train nothing, is not defined for this model, or cannot be right."""
        by_fsdp = self.trainer.accelerator.distributed_type == DistributedType.FSDP
        if not by_fsdp and any(isinstance(one, DTensor) for one in model.parameters()):
            self._check_loading(model)
        if self.config.z and reader.scores == "sigmoid":
            raise ValueError(
                f"The z-loss is of a softmax's logits, got `z`={self.config.z} for {reader.model_type}, which chooses "
                "by sigmoids. Set it to 0."
            )
        if reader.experts % self.config.device_groups:
            raise ValueError(
                f"`device_groups` must divide the experts, got {self.config.device_groups} for {reader.experts}."
            )
        if self.config.bias_rate:
            selection_biases(model, [model.get_submodule(name) for name in reader.names])
        if self.config.has_losses and self.config.gradient == "routers" and not any(reader.linear_routers()):
            raise ValueError(
                "A balance loss must have routers to train, but all are frozen. Unfreeze them, set the coefficients "
                'to 0 to measure only, or use `BalanceConfig(gradient="network")`.'
            )

    def _check_loading(self, model: nn.Module) -> None:
        """Every rank must train rows of its own, and gradients be their mean over all ranks."""
        check_best_model(self.trainer.args, model)
        by_transformers = getattr(model, "is_distributed_loading_by_transformers", False)
        size = model.config.distributed_config.fsdp_size if by_transformers else None
        if size != self.trainer.accelerator.num_processes:
            raise ValueError(
                "`balance` works with models that were sharded when they were loaded only by `DistributedConfig` with "
                f"`fsdp_size` equal to the processes, {self.trainer.accelerator.num_processes}, got {size}. Set it, "
                "with any `ep_size`, or load the model whole."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Attach to the model that is going to be trained."""
        self._let_go()  # a batch-size search starts training again in the same run
        turn_off_own_balance_loss(model)
        self.reader = RouterReader(model)
        self.check_model(model, self.reader)
        self._step, self._last, self._checked = Step(), None, False
        if self.config.bias_rate:
            self._biases = selection_biases(model, [model.get_submodule(name) for name in self.reader.names])
            hold_in_float32(self._biases)
        if self._trains_routers and any(map(is_sharded, model.parameters())):
            self._weights = self.reader.router_weights()
        if self.config.float32_routers:
            self._float32 = Float32Routers(self.reader.routers)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the biases, unless a gradient scaler skipped the step.

        All passes of a step see one bias, and evaluation and checkpoints after it the new one.
        """
        if self._biases and not self.trainer.accelerator.optimizer_step_was_skipped:
            move_selection_biases(self._biases, self._step.totals.counts, self.config.bias_rate)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the hooks off the model."""
        self._let_go()

    def begin_step(self, batches: list[Mapping[str, object]]) -> None:
        """A new optimizer step, of these micro-batches."""
        self._step = Step(batches)

    @contextmanager
    def reading(self, inputs: Mapping[str, object]) -> Iterator[None]:
        """Inside, the model computes the loss of one micro-batch in training."""
        inputs = dict(inputs)  # the Trainer takes some out
        holding = nullcontext([]) if self._weights is None else self._weights.holding(copying=not self._checked)
        with self.reader.listening() as routings, holding as self._places:
            yield
        self._current = self._read(inputs, routings)

    def _read(self, inputs: Mapping[str, object], routings: list[Routing]) -> MicroBatch:
        logits = routings[0].logits
        counted = counted_tokens(inputs.get("attention_mask"), len(logits), logits.device)
        sequences = sequence_numbers(inputs, len(counted), counted.device) if self.config.sequence else None
        to_network = self.config.has_losses and not self._trains_routers
        if self._trains_routers and not self._checked:
            for name, one, linear in zip(self.reader.names, routings, self._linear_routers(), strict=True):
                if linear is not None:
                    check_linear(one, *linear, name)
            self._checked = True
        return micro_batch(routings, counted, self.reader.experts, sequences, with_graph=to_network)

    @property
    def _trains_routers(self) -> bool:
        return self.config.has_losses and self.config.gradient == "routers"

    def _linear_routers(self) -> list[Linear | None]:
        """Weight and bias of each trained router, whole, as the last forward pass used them."""
        if self._weights is None:
            return self.reader.linear_routers()
        return [None if place is None else place.copies for place in self._places]

    @contextmanager
    def joining(self, model: nn.Module) -> Iterator[None]:
        """Inside, the Trainer makes one training step; its backward pass gets the balance term too."""
        accelerator = self.trainer.accelerator
        backward = accelerator.backward

        def joined(loss: Tensor, **kwargs: object) -> None:
            term = self._term()
            backward(loss if term is None else loss + term.to(loss.device), **kwargs)

        ahead = self.config.has_losses and self.config.gradient == "network" and len(self._step.batches) > 1
        if ahead and self._step.totals is None:
            self._count_ahead(model)
        accelerator.backward = joined
        try:
            yield
        finally:
            accelerator.backward = backward
            self._current, self._places = None, []

    def log_entries(self) -> dict[str, float]:
        """Losses and expert load of the last optimizer step, each the mean over layers and the worst layer."""
        if self._last is None:
            return {}
        totals, losses, top_k = self._last
        counts = totals.counts
        load = expert_load(counts.cpu())
        entries = {"experts_per_token": float(top_k), "dead_experts": float(load.dead.sum())}
        entries["dead_experts_worst_layer"] = float(load.dead.max())
        highest = {**losses, "load_max_violation": load.max_violation, "load_variation": load.variation}
        for name, values in highest.items():
            entries |= {name: float(values.mean()), f"{name}_worst_layer": float(values.max())}
        for name, values in {"load_entropy": load.entropy, "load_min_share": load.min_share}.items():
            entries |= {name: float(values.mean()), f"{name}_worst_layer": float(values.min())}
        return entries | {"load_variation_by_chance": variation_by_chance(counts.shape[-1], top_k, int(totals.tokens))}

    def _term(self) -> Tensor | None:
        """What to add to this micro-batch's loss."""
        batch, step = self._current, self._step
        step.seen += 1
        if step.seen > len(step.batches):
            raise ValueError(
                f"`balance` must know how many micro-batches a step has, but this is number {step.seen} of "
                f"{len(step.batches)}: use the Trainer's own training loop and `get_batch_samples`."
            )
        last = step.seen == len(step.batches)
        step.own = step.own + batch.totals()
        if last and step.totals is None:
            step.totals = self._totals(step.own)
        term = None
        if not self.config.has_losses:
            step.sums = step.sums + probability_sums(batch.logits, batch.counted, self.reader.scores)
        elif self.config.gradient == "network":
            term = self._network_term(batch)
        else:
            step.kept.append(batch)
            term = self._routers_term() if last else None
        if last:
            self._last = step.totals, self._losses_of_step(), batch.top_k
        return term

    def _network_term(self, batch: MicroBatch) -> Tensor:
        if not batch.logits.requires_grad:
            raise ValueError(
                "Router logits must have a graph for a gradient to the network, but have none: gradient checkpointing "
                "must run with `use_reentrant=False`, and something below or in the routers must be trained."
            )
        return self._objective(batch)

    def _routers_term(self) -> Tensor:
        """Zero, whose gradient by each router's weight is that of all micro-batches' losses."""
        routers = self.reader.linear_routers()
        gradients: list[Linear | None] = [None] * len(routers)
        for batch in self._step.kept:
            batch.logits.requires_grad_()
            (by_logits,) = torch.autograd.grad(self._objective(batch), batch.logits)
            for layer, linear in enumerate(routers):
                if linear is not None:
                    by_weight = by_logits[layer].T @ batch.inputs[layer].float()
                    by_bias = None if linear[1] is None else by_logits[layer].sum(0)
                    gradients[layer] = _added(gradients[layer], (by_weight, by_bias))
        self._step.kept = []
        sharded = self._weights is not None
        places = self._places if sharded else [None if one is None else Place.of(*one) for one in routers]
        return zero_with(places, gradients)

    def _objective(self, batch: MicroBatch) -> Tensor:
        """This rank's and micro-batch's part of the step's loss, times the ranks: gradients are averaged over them."""
        losses, known = losses_by_layer(self.config, self.reader.scores, batch, self._step.totals), self._step.losses
        for name, loss in losses.items():
            known[name] = known.get(name, 0.0) + loss.detach()
        return weighted(self.config, losses) * self.trainer.accelerator.num_processes

    def _losses_of_step(self) -> dict[str, Tensor]:
        """Each loss of all ranks and micro-batches, (layers,), without coefficients."""
        step = self._step
        losses = step.losses
        if not self.config.has_losses:
            fractions = chosen_fractions(step.totals.counts)
            losses = {"balance_loss": switch_loss(fractions, step.sums) / step.totals.tokens}
        return dict(zip(losses, self._over_ranks(torch.stack([*losses.values()])), strict=True))

    def _totals(self, own: Tensor) -> Totals:
        return Totals.of(self._over_ranks(own), len(self.reader.names), self._current.top_k)

    def _count_ahead(self, model: nn.Module) -> None:
        """The choices of all micro-batches of the step, before the first of them trains."""
        trainer, step, own = self.trainer, self._step, 0
        devices = [torch.cuda.current_device()] if trainer.args.device.type == "cuda" else []
        model.train()
        # Afterwards dropout draws what it drew here, so that the choices are the same.
        with torch.random.fork_rng(devices), torch.no_grad():
            for batch in step.batches:
                trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
                own = own + self._current.totals()
        step.totals = self._totals(own)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(tensor, reduction="sum")

    def _let_go(self) -> None:
        if self.reader is not None:
            self.reader.detach()
        if self._float32 is not None:
            self._float32.detach()
        if self._weights is not None:
            self._weights.detach()
        self.reader, self._float32, self._weights, self._biases = None, None, None, []

    def _check_surroundings(self) -> None:
        args, accelerator = self.trainer.args, self.trainer.accelerator
        kind = accelerator.distributed_type
        by_engine = kind == DistributedType.DEEPSPEED
        # Only these were tried; elsewhere a rank's tokens may be a part of the whole.
        found = {
            str(kind): kind not in TRIED,
            "FSDP's first version": kind == DistributedType.FSDP and not accelerator.is_fsdp2,
            "DeepSpeed without ZeRO": by_engine and not accelerator.state.deepspeed_plugin.zero_stage,
            "torch.nn.DataParallel": args.n_gpu > 1,
            "a model on several devices": getattr(self.trainer, "is_model_parallel", False),
            "a `parallelism_config`": getattr(accelerator, "parallelism_config", None) is not None,
            "`torch_compile`": args.torch_compile,
        }
        for name, is_there in found.items():
            if is_there:
                raise ValueError(
                    f"`balance` works on one device per process, alone or under DDP, FSDP2 and ZeRO, got {name}."
                )


def _added(sum_so_far: Linear | None, one: Linear) -> Linear:
    if sum_so_far is None:
        return one
    return sum_so_far[0] + one[0], None if one[1] is None else sum_so_far[1] + one[1]
