"""What is the loss gradient, averaged over a few training batches?"""

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset
from transformers import set_seed


def mean_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], dataloader: DataLoader, batches: int, seed: int
) -> dict[str, Tensor]:
    """Mean gradient of `model(**batch).loss` without dropout; gradients and the random state are left as they were.

    Args:
        parameters: those whose gradient is wanted, by canonical name.
        dataloader: the training data; its order and position are not touched.
        batches: number of batches, drawn at random by `seed` (the first ones of an iterable dataset).
        seed: also of what the dataset and the collator draw, so that the result depends on nothing drawn before.

    Raises:
        ValueError: the model returns no loss, or a parameter gets no gradient.
    """
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    others = [parameter for parameter in model.parameters() if parameter.grad is not None]
    other_gradients = [parameter.grad for parameter in others]
    training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    count = 0
    try:
        with _seeded_for_now(seed):
            for batch in _random_batches(dataloader, batches, seed):
                loss = model(**_to_device(batch, next(model.parameters()).device)).get("loss")
                if loss is None:
                    raise ValueError("score='gradient' needs a model that returns a loss. Give it labelled data.")
                loss.backward()
                count += 1
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        if missing:
            raise ValueError(f"`{missing[0]}` gets no gradient of the loss. Exclude it, or use score='magnitude'.")
        return {name: parameter.grad.detach().float() / count for name, parameter in parameters.items()}
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, gradient in zip(others, other_gradients, strict=True):
            parameter.grad = gradient
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
        model.train(training)


def _random_batches(dataloader: DataLoader, batches: int, seed: int) -> Iterator[Mapping]:
    dataset, size = dataloader.dataset, dataloader.batch_size
    if size is None:  # accelerate's loaders have a batch sampler instead
        size = dataloader.batch_sampler.batch_size if isinstance(dataloader.batch_sampler, BatchSampler) else 1
    if not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order[: batches * size].tolist())
    return itertools.islice(DataLoader(dataset, batch_size=size, collate_fn=dataloader.collate_fn), batches)


@contextlib.contextmanager
def _seeded_for_now(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch, and give them back the states they had."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            set_seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _to_device(batch: Mapping, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
