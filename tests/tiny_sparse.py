"""Tiny models with zeros in them."""

import torch
from transformers import PreTrainedModel

from tiny_models import tiny_model


def sparse_model(
    family: str = "llama", head: str = "causal_lm", sparsity: float = 0.8, **changes: object
) -> PreTrainedModel:
    """A tiny model (see `tiny_model`) whose matrices have zeros at random places and begin with a -0.0."""
    model = tiny_model(family, head, **changes)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=random) < sparsity, 0)
                parameter.view(-1)[0] = -0.0
    return model
