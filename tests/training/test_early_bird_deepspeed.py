"""Two processes that split a model by ZeRO draw the early-bird ticket of one, and train the smaller model."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from sparse_hf.tickets.structured_ticket import StructuredTicket
from training.bird_processes import (
    CONFIG,
    NO_DROPOUT,
    OPTIONS,
    bird,
    check_cut,
    check_search,
    cut_only,
    search_killed,
    search_whole,
)
from training.tiny_training import assert_same, tensors
from training.two_processes import found_by_both, leave_found, run_two, without_compiling
from training.zero_processes import plain_trainer, search_trainer, whole


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
# The coefficients of heads stay gathered between steps, those of neurons do not.
SMALL = {"stage3_param_persistence_threshold": 20}


def whole_weights(model) -> dict:
    return {name: whole(one) for name, one in model.named_parameters()}


def loaded_in_parts(root: Path) -> PreTrainedModel:
    """As ZeRO-3 loads a model: no rank ever holds it whole."""
    if os.environ["RANK"] == "0":
        bird().save_pretrained(root / "base")
    dist.barrier()
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2})
    assert alive.is_zero3()
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", **NO_DROPOUT)
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return model


def magnitude_ticket() -> StructuredTicket:
    return StructuredTicket.from_model(bird(), CONFIG)


def run_one_process(folder: str) -> None:
    """What each of the two processes does."""
    without_compiling()
    root, found, ticket = Path(folder), {}, magnitude_ticket()
    found |= search_whole(root, "zero2", partial(search_trainer, 2), whole_weights)
    zero3 = partial(search_trainer, 3, changes=SMALL)
    found |= search_whole(root, "zero3", zero3, whole_weights)
    found |= search_killed(root, "zero3", zero3, whole_weights)
    found |= cut_only(root, "zero1", partial(search_trainer, 1), whole_weights)
    in_parts = partial(loaded_in_parts, root)
    found |= cut_only(root, "parts", partial(search_trainer, 3), whole_weights, model=in_parts)
    with pytest.raises(ValueError, match="found in whole weights, but ranks hold parts of `bert.embeddings"):
        search_trainer(3, root / "refused", ticket, model=in_parts)
    under_ticket = search_trainer(3, root / "ticket", ticket, model=bird, changes=SMALL, **OPTIONS)
    under_ticket.train()
    found |= {f"ticket/weight/{name}": one for name, one in whole_weights(under_ticket.model).items()}
    leave_found(found, root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder, and by search and kind the whole tensors that both processes came to."""
    folder = tmp_path_factory.mktemp("zero-bird")
    run_two(__name__, "run_one_process", folder)
    return folder, found_by_both(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    trainer = plain_trainer(tmp_path_factory.mktemp("alone"), CONFIG, 4, model=bird, **OPTIONS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stage", [2, 3])
def test_the_draw_and_the_smaller_model_are_those_of_one_process(sharded, alone, stage):
    check_search(sharded[0] / f"zero{stage}-whole", sharded[1][f"zero{stage}-whole"], alone)


def test_a_resumed_search_is_the_one_that_did_not_stop(sharded):
    for kind, values in sharded[1]["zero3-whole"].items():
        assert_same(sharded[1]["zero3-killed"][kind], values)


@pytest.mark.parametrize("name", ["zero1-cut", "parts-cut"])
def test_the_smaller_model_begins_at_slices_of_the_start(sharded, name):
    check_cut(sharded[1][name])


def test_training_under_a_ticket_is_that_of_one_process(sharded, tmp_path):
    trainer = plain_trainer(tmp_path, magnitude_ticket(), 4, model=bird, **OPTIONS)
    trainer.train()
    found, weights = sharded[1]["ticket"]["weight"], tensors(trainer.model)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=2e-5), name
