"""A picture of the experts' load at the end of a training."""

import importlib.util
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from sparse_hf.algorithms.balance import chosen_counts
from sparse_hf.hub.expert_load_picture import plot_expert_load
from sparse_hf.moe.counted_tokens import counted_tokens
from sparse_hf.moe.router_logits import RouterReader, layer_number


class ExpertLoadCallback(TrainerCallback):
    """Draws the load of all experts when training ends: `Trainer(..., callbacks=[ExpertLoadCallback()])`.

    What is drawn was counted in the last evaluation (the best one's, if the best model was loaded), padding left out,
    over all evaluation sets and ranks; its forward passes are used, so it costs next to nothing. Where ranks do not
    divide the rows, the Trainer repeats some, and these count twice.

    Attributes:
        counts: int64 (layers, experts) by the step of the evaluation.
    """

    def __init__(self, picture: str | Path | None = None) -> None:
        """
        Args:
            picture: where it is written; None: `expert_load.png` in the output folder.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("A picture needs matplotlib. Run `pip install 'sparse_hf[demo]'`.")
        self.picture = picture
        self.counts: dict[int, Tensor] = {}
        self._names: tuple[str, ...] = ()
        self._running: Tensor | None = None  # counts of the running evaluation
        self._mask: Tensor | None = None  # attention mask of the running forward pass
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Watch the experts of the model that is going to be trained."""
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "`ExpertLoadCallback` counts in evaluations, but `eval_strategy` is 'no'. Set it, or draw with "
                "`plot_expert_load(expert_usage(model, batches), path)`."
            )
        self._let_go()
        reader = RouterReader(model)
        reader.detach()
        self._names, self.counts = reader.names, {}
        self._running = torch.zeros(len(reader.names), reader.experts, dtype=torch.int64, device=args.device)
        self._hooks = [model.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        for layer, name in enumerate(reader.names):
            experts = model.get_submodule(f"{name}.experts")
            self._hooks.append(
                experts.register_forward_pre_hook(
                    lambda module, arguments, layer=layer: self._count(layer, module, arguments)
                )
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What was counted since the last evaluation was none."""
        self._running.zero_()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the counts of the evaluation set that was just finished."""
        if not self._hooks:
            return
        counts = reduce(self._running, reduction="sum").cpu()
        self.counts[state.global_step] = self.counts.get(state.global_step, 0) + counts
        self._running.zero_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Draw the picture, on one process."""
        self._let_go()
        best = args.load_best_model_at_end and state.best_global_step in self.counts
        step = state.best_global_step if best else max(self.counts, default=None)
        if step is None or not state.is_world_process_zero or not bool(self.counts[step].sum(dim=1).all()):
            return
        path = Path(self.picture or Path(args.output_dir) / "expert_load.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = [layer_number(name) for name in self._names]
        plot_expert_load(self.counts[step], path, f"Expert load in the evaluation after step {step}", numbers)

    def _see_mask(self, model: nn.Module, arguments: tuple, inputs: dict[str, object]) -> None:
        self._mask = None if model.training else inputs.get("attention_mask")

    def _count(self, layer: int, experts: nn.Module, arguments: tuple) -> None:
        if experts.training or len(arguments) != 3:
            return
        chosen = arguments[1]
        counted = counted_tokens(self._mask, len(chosen), chosen.device)
        self._running[layer] += chosen_counts(chosen, counted, self._running.shape[1]).to(self._running.device)

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mask = [], None
