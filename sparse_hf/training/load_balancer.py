"""The load-balancing loss of one optimizer step, whatever micro-batches and ranks it is split into.

For a layer the loss is experts * sum_i f_i P_i: f needs the choices of the whole step, and P's gradient at a token
needs f. Two ways, by `BalanceConfig.gradient`, neither of which depends on the split:

- `"routers"`: the routers' inputs and logits are kept, and the last micro-batch's backward pass brings the gradient of
  all of them to the routers' weights, which are linear maps. One small reduction over ranks per step.
- `"network"`: counts first. Without accumulation f is known after the forward pass; with it, all micro-batches run
  forward once more, without gradients and with the random numbers that they will have, before the first one trains.

The term joins right before the backward pass, when the Trainer has scaled its loss for accumulation and ranks, so it
depends on none of this, and the loss that the Trainer logs stays the task's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.balance import (
    chosen_counts,
    chosen_fractions,
    probability_sums,
    switch_loss,
    z_loss_sums,
)
from sparse_hf.algorithms.expert_load import expert_load, variation_by_chance
from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.moe.own_balance_loss import turn_off_own_balance_loss
from sparse_hf.moe.router_logits import RouterReader, check_linear, counted_tokens


TRIED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass, all layers.

    Attributes:
        inputs: of the routers, one (tokens, hidden) per layer, detached.
        logits: (layers, tokens, experts).
        counted: bool (tokens,), False for padding.
        counts: of choices on this rank, int64 (layers, experts).
        top_k: experts per token.
    """

    inputs: list[Tensor]
    logits: Tensor
    counted: Tensor
    counts: Tensor
    top_k: int


@dataclass
class Step:
    """What is known of the running optimizer step."""

    batches: list[Mapping[str, object]] = field(default_factory=list)
    seen: int = 0
    kept: list[MicroBatch] = field(default_factory=list)
    own_counts: Tensor | int = 0  # of choices on this rank so far, (layers, experts)
    counts: Tensor | None = None  # on all ranks and in all micro-batches, once known
    sums: Tensor | float = 0.0  # of probabilities on this rank so far, (layers, experts)


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
        self._active = bool(config.coefficient or config.z)
        self._current: MicroBatch | None = None
        self._step = Step()
        self._checked = False
        self._last: tuple[Tensor, Tensor, int] | None = None  # counts and probabilities of a step, top_k
        self._check_surroundings()
        if trainer.model_init is None:
            turn_off_own_balance_loss(trainer.model)
            self.check_model(reader := RouterReader(trainer.model))
            reader.detach()

    def check_model(self, reader: RouterReader) -> None:
        """Raise ValueError if the loss would train nothing, or is not defined for this model."""
        if self.config.z and reader.scores == "sigmoid":
            raise ValueError(
                f"The z-loss is of a softmax's logits, got `z`={self.config.z} for {reader.model_type}, which chooses "
                "by sigmoids. Set it to 0."
            )
        if self._active and self.config.gradient == "routers" and not any(reader.linear_routers()):
            raise ValueError(
                "A balance loss must have routers to train, but all are frozen. Unfreeze them, set the coefficients "
                'to 0 to measure only, or use `BalanceConfig(gradient="network")`.'
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Attach to the model that is going to be trained."""
        self._let_go()  # a batch-size search starts training again in the same run
        turn_off_own_balance_loss(model)
        self.reader = RouterReader(model)
        self.check_model(self.reader)
        self._step, self._last, self._checked = Step(), None, False

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
        mask = {"attention_mask": inputs.get("attention_mask")}
        with self.reader.listening() as routings:
            yield
        counted = counted_tokens(mask, routings[0])
        counts = [chosen_counts(one.chosen, counted, self.reader.experts) for one in routings]
        to_network = self._active and self.config.gradient == "network"
        if self._active and not to_network and not self._checked:
            for name, one, linear in zip(self.reader.names, routings, self.reader.linear_routers(), strict=True):
                if linear is not None:
                    check_linear(one, *linear, name)
            self._checked = True
        # float32 from here on, whatever the model computes in.
        logits = torch.stack([(one.logits if to_network else one.logits.detach()).float() for one in routings])
        top_k = routings[0].chosen.shape[1]
        self._current = MicroBatch([one.inputs for one in routings], logits, counted, torch.stack(counts), top_k)

    @contextmanager
    def joining(self, model: nn.Module) -> Iterator[None]:
        """Inside, the Trainer makes one training step; its backward pass gets the balance term too."""
        accelerator = self.trainer.accelerator
        backward = accelerator.backward

        def joined(loss: Tensor, **kwargs: object) -> None:
            term = self._term()
            backward(loss if term is None else loss + term.to(loss.device), **kwargs)

        ahead = self._active and self.config.gradient == "network" and len(self._step.batches) > 1
        if ahead and self._step.counts is None:
            self._count_ahead(model)
        accelerator.backward = joined
        try:
            yield
        finally:
            accelerator.backward = backward
            self._current = None

    def log_entries(self) -> dict[str, float]:
        """Balance loss and expert load of the last optimizer step, each the mean over layers and the worst layer."""
        if self._last is None:
            return {}
        counts, probabilities, top_k = self._last
        losses = switch_loss(chosen_fractions(counts), probabilities)
        load = expert_load(counts.cpu())
        tokens = max(1, int(counts[0].sum()) // top_k)
        entries = {"dead_experts": float(load.dead.sum()), "dead_experts_worst_layer": float(load.dead.max())}
        highest = {"balance_loss": losses, "load_max_violation": load.max_violation, "load_variation": load.variation}
        for name, values in highest.items():
            entries |= {name: float(values.mean()), f"{name}_worst_layer": float(values.max())}
        for name, values in {"load_entropy": load.entropy, "load_min_share": load.min_share}.items():
            entries |= {name: float(values.mean()), f"{name}_worst_layer": float(values.min())}
        return entries | {"load_variation_by_chance": variation_by_chance(counts.shape[-1], top_k, tokens)}

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
        step.own_counts = step.own_counts + batch.counts
        step.sums = step.sums + probability_sums(batch.logits.detach(), batch.counted, self.reader.scores)
        if last and step.counts is None:
            step.counts = self._over_ranks(step.own_counts)
        term = None
        if self._active and self.config.gradient == "network":
            term = self._network_term(batch)
        elif self._active:
            step.kept.append(batch)
            term = self._routers_term() if last else None
        if last:
            tokens = step.counts[0].sum().clamp(min=1) / batch.top_k
            self._last = step.counts, self._over_ranks(step.sums) / tokens, batch.top_k
        return term

    def _network_term(self, batch: MicroBatch) -> Tensor:
        if not batch.logits.requires_grad:
            raise ValueError(
                "Router logits must have a graph for a gradient to the network, but have none: gradient checkpointing "
                "must run with `use_reentrant=False`, and something below or in the routers must be trained."
            )
        return self._objective(batch)

    def _routers_term(self) -> Tensor:
        """A term whose gradient by each router's weight is that of all micro-batches' losses.

        It is the product of that gradient and the weight, so its value means nothing.
        """
        routers = self.reader.linear_routers()
        trained = [layer for layer, router in enumerate(routers) if router is not None]
        weights, biases = dict.fromkeys(trained, 0.0), dict.fromkeys(trained, 0.0)
        for batch in self._step.kept:
            batch.logits.requires_grad_()
            (gradient,) = torch.autograd.grad(self._objective(batch), batch.logits)
            for layer in trained:
                weights[layer] = weights[layer] + gradient[layer].T @ batch.inputs[layer].float()
                biases[layer] = biases[layer] + gradient[layer].sum(0)
        self._step.kept = []
        products = [(weights[layer] * routers[layer][0].float()).sum() for layer in trained]
        products += [
            (biases[layer] * routers[layer][1].float()).sum() for layer in trained if routers[layer][1] is not None
        ]
        return torch.stack(products).sum()

    def _objective(self, batch: MicroBatch) -> Tensor:
        """This rank's and micro-batch's part of the step's loss, times the ranks: gradients are averaged over them."""
        counts = self._step.counts
        sums = probability_sums(batch.logits, batch.counted, self.reader.scores)
        loss = self.config.coefficient * switch_loss(chosen_fractions(counts), sums).sum()
        if self.config.z:
            loss = loss + self.config.z * z_loss_sums(batch.logits, batch.counted).sum()
        return loss * self.trainer.accelerator.num_processes * batch.top_k / counts[0].sum().clamp(min=1)

    def _count_ahead(self, model: nn.Module) -> None:
        """The choices of all micro-batches of the step, before the first of them trains."""
        trainer, step, counts = self.trainer, self._step, 0
        devices = [torch.cuda.current_device()] if trainer.args.device.type == "cuda" else []
        model.train()
        # Afterwards dropout draws what it drew here, so that the choices are the same.
        with torch.random.fork_rng(devices), torch.no_grad():
            for batch in step.batches:
                trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
                counts = counts + self._current.counts
        step.counts = self._over_ranks(counts)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(tensor, reduction="sum")

    def _let_go(self) -> None:
        if self.reader is not None:
            self.reader.detach()
        self.reader = None

    def _check_surroundings(self) -> None:
        args, accelerator = self.trainer.args, self.trainer.accelerator
        # Only these were tried; elsewhere a router's weight or a rank's tokens may be a part of the whole.
        found = {
            str(accelerator.distributed_type): accelerator.distributed_type not in TRIED,
            "torch.nn.DataParallel": args.n_gpu > 1,
            "a model on several devices": getattr(self.trainer, "is_model_parallel", False),
            "a `parallelism_config`": getattr(accelerator, "parallelism_config", None) is not None,
            "`torch_compile`": args.torch_compile,
        }
        for name, is_there in found.items():
            if is_there:
                raise ValueError(f"`balance` works on one device per process, alone or under DDP, got {name}.")
