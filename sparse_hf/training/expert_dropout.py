"""Experts that are left out of a step's choice, so that others are trained too."""

import functools

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.algorithms.expert_dropout import AmongKept, kept_experts
from sparse_hf.moe.router_logits import RouterReader
from sparse_hf.moe.top_k import FIXED, get_top_k, largest_top_k
from sparse_hf.training.first_masks import seeded


class ExpertDropoutCallback(TrainerCallback):
    """Expert dropout in any Trainer: `Trainer(..., callbacks=[ExpertDropoutCallback(0.1)])`.

    In each optimizer step every expert of every layer is left out of the choice with this probability, for all its
    tokens, micro-batches and ranks; tokens go to the best of the others. At least as many stay as a token needs.
    What is left out depends on (seed, step) alone, so a resumed training continues as if it had not stopped. There
    is no rescaling, and no dropout in evaluation. Router logits, and so a balance loss, know nothing of it, but see
    what was chosen.
    """

    def __init__(self, probability: float, seed: int = 0) -> None:
        """
        Args:
            probability: of an expert to be left out, in [0, 1).

        Raises:
            ValueError: it is not in this range.
        """
        number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
        if not number or not 0 <= probability < 1:
            raise ValueError(f"`probability` must be in [0, 1), got {probability!r}.")
        self.probability, self.seed = probability, seed
        self._model: nn.Module | None = None
        self._blocks: list[nn.Module] = []
        self._replaced: list[object | None] = []  # what each block had in the place of its class's `forward`
        self._experts = self._top_k = 0
        self._kept: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Take part in the choices of the model that is going to be trained."""
        self._let_go()  # a batch-size search starts training again in the same run
        reader = RouterReader(model)
        reader.detach()
        if model.config.model_type in FIXED:
            raise ValueError(
                f"Expert dropout must know how routers choose, which it does not of {model.config.model_type}."
            )
        if largest_top_k(model) < reader.experts:
            raise ValueError(
                "Expert dropout works where a token chooses among all experts, but this model's routers choose among "
                f"groups of them, at most {largest_top_k(model)} of {reader.experts} experts. Drop it."
            )
        self._model, self._experts = model, reader.experts
        self._blocks = [model.get_submodule(name) for name in reader.names]
        self._draw(state.global_step)
        self._replaced = [vars(block).get("forward") for block in self._blocks]
        for layer, block in enumerate(self._blocks):
            block.forward = functools.partial(self._forward, layer, block, block.forward)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Draw the step's experts."""
        self._draw(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the model alone."""
        self._let_go()

    def kept(self) -> Tensor:
        """The experts that may be chosen in the running step, bool (layers, experts)."""
        return torch.stack(self._kept)

    def _draw(self, step: int) -> None:
        self._top_k = get_top_k(self._model)  # a schedule may have changed it
        generator = seeded(self.seed, step)
        kept = kept_experts(len(self._blocks), self._experts, self._top_k, self.probability, generator)
        self._kept = list(kept.to(next(self._model.parameters()).device))

    def _forward(self, layer: int, block: nn.Module, original: object, *args: object, **kwargs: object) -> object:
        if not block.training:
            return original(*args, **kwargs)
        with AmongKept(self._kept[layer], self._top_k) as choice:
            output = original(*args, **kwargs)
        if choice.choices != 1:
            raise ValueError(
                "Expert dropout must find the one choice that a layer makes in a forward pass, found "
                f"{choice.choices} in {type(block).__name__}: its block is replaced by a kernel or compiled."
            )
        return output

    def _let_go(self) -> None:
        for block, replaced in zip(self._blocks, self._replaced, strict=True):
            del block.forward
            if replaced is not None:
                block.forward = replaced
        self._blocks, self._replaced, self._model = [], [], None
