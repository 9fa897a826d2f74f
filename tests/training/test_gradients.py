"""Loss gradients over a few batches, without a trace in the model, the data or the random state."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_hf.training.gradients import mean_gradients
from training.tiny_training import tiny_classifier, tiny_rows, tiny_trainer


class Linear(nn.Module):
    """loss = mean of w x over the batch, so that the gradient is the mean of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.batches = []

    def forward(self, x):
        self.batches.append(x)
        return {"loss": (x @ self.weight).mean()}


def gradients_of(model: nn.Module, loader: DataLoader, batches: int, seed: int = 0) -> torch.Tensor:
    return mean_gradients(model, {"weight": model.weight}, loader, batches, seed)["weight"]


def rows(number: int) -> list[dict]:
    return [{"x": torch.tensor([float(i), 1.0])} for i in range(number)]


def test_it_is_the_mean_over_the_batches():
    model = Linear()
    gradient = gradients_of(model, DataLoader(rows(8), batch_size=4), batches=2)
    assert [len(batch) for batch in model.batches] == [4, 4]
    assert gradient.tolist() == [3.5, 1.0]  # the mean of 0..7


def test_batches_are_drawn_by_the_seed():
    first, again, other = (
        gradients_of(Linear(), DataLoader(rows(100), batch_size=2), batches=2, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_batches_than_data():
    model = Linear()
    gradients_of(model, DataLoader(rows(3), batch_size=2), batches=9)
    assert sum(len(batch) for batch in model.batches) == 3


def test_the_trainers_batch_size_is_kept(tmp_path):
    """The Trainer's own loader hides its batch size in a batch sampler."""
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4)
    model, sizes = trainer.model, []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output["logits"])))
    parameters = {"w": model.bert.encoder.layer[0].output.dense.weight}
    mean_gradients(model, parameters, trainer.get_train_dataloader(), batches=3, seed=0)
    assert sizes == [4, 4, 4]


class Stream(IterableDataset):
    def __iter__(self):
        yield from rows(100)


def test_an_iterable_dataset_gives_its_first_batches():
    model = Linear()
    assert gradients_of(model, DataLoader(Stream(), batch_size=2), batches=2).tolist() == [1.5, 1.0]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    model = tiny_classifier().train(training)
    weight = model.bert.encoder.layer[0].output.dense.weight
    kept, other = torch.ones_like(weight), torch.ones_like(model.classifier.weight)
    weight.grad, model.classifier.weight.grad = kept, other
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def collate(batch):  # as collators that mask words do
        random.random(), np.random.rand(), torch.rand(1)
        return {
            "input_ids": torch.stack([row["input_ids"] for row in batch]),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    loader = DataLoader(tiny_rows(8), batch_size=4, collate_fn=collate, shuffle=True)
    first = mean_gradients(model, {"w": weight}, loader, 2, seed=0)["w"]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert model.training is training
    assert weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.classifier.weight.grad is other
    assert model.bert.pooler.dense.weight.grad is None
    assert torch.equal(first, mean_gradients(model, {"w": weight}, loader, 2, seed=0)["w"])  # dropout is off


def test_what_the_collator_draws_depends_on_the_seed_only():
    """As when masked words are drawn; a resumed run is in another random state than the one it continues."""

    def collate(batch):
        return {"x": torch.stack([row["x"] for row in batch]) * random.random() * np.random.rand() * torch.rand(1)}

    found = []
    for seed in (5, 6):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        found.append(gradients_of(Linear(), DataLoader(rows(8), batch_size=4, collate_fn=collate), batches=2))
    assert torch.equal(*found)


def test_a_model_without_a_loss_is_refused():
    class Silent(Linear):
        def forward(self, x):
            return {"logits": x @ self.weight}

    model = Silent()
    with pytest.raises(ValueError, match="a model that returns a loss"):
        gradients_of(model, DataLoader(rows(4), batch_size=2), batches=1)
    assert model.training


def test_a_weight_outside_the_loss_is_named():
    model = Linear()
    unused = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="`unused` gets no gradient of the loss"):
        mean_gradients(model, {"weight": model.weight, "unused": unused}, DataLoader(rows(4)), 1, 0)
    assert model.weight.grad is None
