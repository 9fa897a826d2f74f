"""How many choices do full experts lose while a Trainer trains our own mixtures?"""

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class DroppedTokens(TrainerCallback):
    """Adds up what the mixture's blocks lose in training, for the Trainer's log; other models are left alone.

    A block's `dropped_fraction` is of one forward pass on one rank; what is logged is the mean over all passes and
    ranks since the last record. Passes that gradient checkpointing repeats count twice and alike.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0)  # by layer; the last entry counts passes
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Watch the blocks of the model that is going to be trained."""
        self._let_go()  # a batch-size search starts training again in the same run
        blocks = _blocks(model)
        self._sums = torch.zeros(len(blocks) + 1, device=args.device)
        for layer, block in enumerate(blocks):
            self._hooks.append(block.register_forward_hook(lambda module, *_, layer=layer: self._add(layer, module)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the hooks off the model."""
        self._let_go()

    def log_entries(self) -> dict[str, float]:
        """Of all passes since the last call, the mean over layers and the worst layer; all ranks ask together."""
        if len(self._sums) < 2:
            return {}
        *sums, passes = reduce(self._sums, reduction="sum").tolist()
        self._sums.zero_()
        if not passes:
            return {}
        fractions = [one / passes for one in sums]
        return {
            "dropped_fraction": sum(fractions) / len(fractions),
            "dropped_fraction_worst_layer": max(fractions),
        }

    def _add(self, layer: int, block: nn.Module) -> None:
        if not block.training or block.dropped_fraction is None:
            return
        self._sums[layer] += block.dropped_fraction.to(self._sums)
        self._sums[-1] += layer == 0

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Those that can lose tokens. Their class is another object where the model came by `trust_remote_code`."""
    blocks = [module for module in model.modules() if type(module).__name__ == "MixtureBlock"]
    return [one for one in blocks if one.routing.kind == "expert_choice" or one.routing.capacity_factor is not None]
