"""A tiny BERT classifier with a DSEE adapter, and trainers for it."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer

from sparse_hf import DseeConfig
from training.tiny_training import tiny_arguments, tiny_classifier, tiny_rows


def tiny_dsee(seed: int = 0, **changes: object) -> PeftModel:
    """Query and value tuned with r=2 and nnz=8, key only masked."""
    options = dict(r=2, nnz=8, target_modules=["query", "value"], masked_modules=["key"], task_type="SEQ_CLS")
    return get_peft_model(tiny_classifier(seed), DseeConfig(**{**options, **changes}))


def masks_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The packed masks of all adapted matrices."""
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if "sparse_hf_dsee_mask" in name}


def zeros_in(model: torch.nn.Module, part: str) -> float:
    """Share of zeros in the frozen weights of the modules that are named so."""
    weights = [tensor for name, tensor in model.named_parameters() if name.endswith(f"{part}.base_layer.weight")]
    assert weights
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def plain_trainer(folder: Path, callbacks: list, model: PeftModel | None = None, **options: object) -> Trainer:
    """A stock Trainer."""
    model = tiny_dsee() if model is None else model
    rows, arguments = tiny_rows(), tiny_arguments(folder, **options)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
