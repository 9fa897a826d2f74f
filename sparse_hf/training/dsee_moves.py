"""When does the support of S2 move while it is trained?"""

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.sharded_tensors import local_part, part_of, whole_of
from sparse_hf.algorithms.supports import move_support, random_support
from sparse_hf.algorithms.zero_partitions import is_partitioned
from sparse_hf.training.dsee_masking import dsee_adapter


class DseeSupportCallback(TrainerCallback):
    """Let S2's places move: every so often its smallest values give way to places of larger gradient.

    Beyond the DSEE paper, whose support is fixed; the rule is RigL's for masks (Evci et al. 2020), with the gradient
    at random candidates only, so that no dense gradient is needed. New entries begin at 0 with optimizer moments of 0.
    """

    def __init__(
        self,
        every: int = 100,
        drop_fraction: float = 0.3,
        candidates: int = 10,
        end_fraction: float = 0.75,
        seed: int = 0,
    ) -> None:
        """
        Args:
            every: optimizer steps between two moves.
            drop_fraction: share of the entries that move, in (0, 1].
            candidates: random places looked at per entry of S2.
            end_fraction: share of the training after which nothing moves, in (0, 1].
            seed: of the candidates, drawn anew from (seed, step, matrix).

        Raises:
            ValueError: a value out of its range.
        """
        if every < 1 or candidates < 1:
            raise ValueError(f"`every` and `candidates` must be at least 1, got {every} and {candidates}.")
        for name, value in (("drop_fraction", drop_fraction), ("end_fraction", end_fraction)):
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
        self.every, self.drop_fraction, self.candidates = every, drop_fraction, candidates
        self.end_fraction, self.seed = end_fraction, seed
        self._watching = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Check that there is an adapter whose support can be watched, and values that can be moved."""
        dsee_adapter(model)
        if any(map(is_partitioned, model.parameters())):
            raise ValueError(
                "A support cannot move under DeepSpeed, which steps values in flat copies of its own: use one "
                "process, DDP or FSDP2."
            )
        if args.torch_compile:
            raise ValueError("A support cannot move under `torch_compile`, which does not see hooks: switch it off.")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Watch the gradients at new candidates in the steps that end with a move."""
        if not self._due(state):
            return
        from sparse_hf.dsee.choices import seeded  # here, since it needs PEFT
        from sparse_hf.dsee.masks import adapted_layers
        from sparse_hf.dsee.weight_gradients import CandidateGradients

        adapter = dsee_adapter(model)
        layers = adapted_layers(model, adapter)
        layers = {name: layer for name, layer in layers.items() if adapter in layer.sparse_hf_dsee_values}
        if not layers:
            raise ValueError(f"S2 of adapter `{adapter}` cannot move, since its `nnz` is 0.")
        places = {
            name: random_support(
                layer.weight_shape,
                min(layer.weight.numel(), self.candidates * layer.sparse_hf_dsee_values[adapter].numel()),
                seeded(self.seed, f"{state.global_step} {name}"),
            )
            for name, layer in layers.items()
        }
        self._watching = CandidateGradients(layers, places), layers, places, adapter
        self._watching[0].start()

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: object,
    ) -> None:
        """Move the supports after the update."""
        if self._watching is None:
            return
        watching, layers, places, adapter = self._watching
        self._watching = None
        found = watching.stop()
        if not all(bool(one.isfinite().all()) for one in found.values()):
            return  # an overflow in fp16: the optimizer skipped this step too
        for name, gradients in found.items():
            layer = layers[name]
            values, indices = layer.sparse_hf_dsee_values[adapter], layer.sparse_hf_dsee_indices[adapter]
            new, origin = move_support(
                indices.long().cpu(),
                whole_of(local_part(values), values).float().cpu(),
                places[name],
                gradients.cpu(),
                numel=layer.weight.numel(),
                drop_fraction=self.drop_fraction,
            )
            for tensor in (values, *_moments(optimizer, values)):
                held = local_part(tensor)  # all ranks have the few whole values for once
                held.copy_(part_of(_carried(whole_of(held, tensor), origin.to(held.device)), tensor))
            layer.set_support(adapter, new)

    def _due(self, state: TrainerState) -> bool:
        step = state.global_step + 1
        return step % self.every == 0 and step <= self.end_fraction * state.max_steps


def _moments(optimizer: torch.optim.Optimizer, values: Tensor) -> list[Tensor]:
    state = optimizer.state.get(values, {})
    return [one for one in state.values() if isinstance(one, Tensor) and one.shape == values.shape]


def _carried(old: Tensor, origin: Tensor) -> Tensor:
    """What stays goes with its entry; a new entry begins at 0."""
    return torch.where(origin >= 0, old[origin.clamp_min(0)], torch.zeros_like(old))
