"""A tiny mixture of experts in training: eight rows of different lengths, as one optimizer step in any split."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.training.trainer import SparseTrainer
from tiny_models import tiny_model
from training.tiny_training import tiny_arguments


ROWS, LENGTH = 8, 10


def rows(count: int = ROWS) -> list[dict]:
    """Row r ends in r % 4 tokens of padding, and uses few tokens, so that load is uneven and differs between rows."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(count):
        ids = torch.randint(3, 10 + 10 * row, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - row % 4).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def mixtral(**changes: object) -> PreTrainedModel:
    """Two layers, four experts, two per token, and weights so large that routing matters."""
    return tiny_model("mixtral", "causal_lm", **{"num_hidden_layers": 2, "initializer_range": 0.3, **changes})


class Gradients(TrainerCallback):
    """Takes the gradients of a step before the optimizer sees them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self.found = {name: one.grad.clone() for name, one in named if one.grad is not None}


def trainer(
    folder: Path, balance: BalanceConfig | None = None, model: PreTrainedModel | None = None, **changes: object
) -> SparseTrainer | Trainer:
    """One step of SGD over the eight rows; a stock Trainer without `balance`."""
    defaults = dict(
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=ROWS,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
    )
    own = {name: changes.pop(name) for name in ("eval_dataset", "callbacks", "model_init") if name in changes}
    arguments = tiny_arguments(folder, **{**defaults, **changes})
    model = mixtral() if model is None and "model_init" not in own else model
    if balance is None:
        return Trainer(model, arguments, train_dataset=rows(), **own)
    return SparseTrainer(model, arguments, train_dataset=rows(), balance=balance, **own)


def step_gradients(folder: Path, balance: BalanceConfig | None, model: PreTrainedModel, **changes: object) -> dict:
    """The gradients of one step."""
    gradients = Gradients()
    trainer(folder, balance, model, callbacks=[gradients], **changes).train()
    return gradients.found


def all_losses(gradient: str) -> BalanceConfig:
    """Each with so large a coefficient that an error in it is seen."""
    return BalanceConfig(1.0, z=0.1, gradient=gradient, sequence=1.0, device=1.0, device_groups=2, entropy=-0.5)


def balance_gradients(folder: Path, gradient: str | None, **changes: object) -> dict[str, Tensor]:
    """What all losses together add to the gradients of one step; None: Transformers' own."""
    found = []
    for coefficient in (1.0, 0.0):
        if gradient is None:
            model = mixtral(output_router_logits=True, router_aux_loss_coef=coefficient)
            found.append(step_gradients(folder, None, model, **changes))
        else:
            config = all_losses(gradient) if coefficient else BalanceConfig(0.0, gradient=gradient)
            found.append(step_gradients(folder, config, mixtral(), **changes))
    with_it, without = found
    return {name: with_it[name] - without[name] for name in with_it}


def routers_of(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the routers' weights."""
    return {name: one for name, one in gradients.items() if ".gate." in name}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over tensors of |found - expected| / |expected|, in the Euclidean norm."""
    assert found.keys() == expected.keys()
    assert found
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())
