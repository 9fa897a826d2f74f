"""Two processes that shard a model by FSDP2, or copy it (DDP), find the ticket of one process, and rewind exactly."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.tickets.configs import LotteryTicketConfig
from training.search_processes import (
    EARLY,
    EVALUATED,
    LATE,
    STEPS,
    check_early,
    check_late,
    other_classifier,
    search_early,
    search_late,
)
from training.test_fsdp2 import FSDP, pretend_to_be_on_gpus
from training.tiny_training import assert_same, tied_classifier, tiny_rows
from training.two_processes import found_by_both, leave_found, run_two
from training.zero_processes import plain_trainer


pytestmark = pytest.mark.slow
BY_GRADIENT = LotteryTicketConfig(sparsity=0.6, rounds=1, score="gradient", score_batches=4, final_training=False)
# A head of one row, of which the second process holds nothing.
ONE_ROW = {"num_labels": 1}
ONE_LABEL = [{**row, "labels": float(row["labels"])} for row in tiny_rows()]


def sharded_trainer(folder: Path, config: object, **options: object):
    pretend_to_be_on_gpus()
    own = {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": "FULL_STATE_DICT"}}
    return plain_trainer(folder, config, 2, accelerator_config={"use_configured_state": True}, **own, **options)


def copied_trainer(folder: Path, config: object, **options: object):
    AcceleratorState._reset_state(True)
    return plain_trainer(folder, config, 2, **options)


def whole_weights(model) -> dict:
    named = named_canonical_parameters(model).items()
    return {name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for name, one in named}


def run_one_process(folder: str) -> None:
    """What each of the two processes does."""
    root = Path(folder)
    one_label = partial(sharded_trainer, train_dataset=ONE_LABEL)
    found = search_early(root, "ddp", copied_trainer, whole_weights)
    assert PartialState().distributed_type == DistributedType.MULTI_CPU
    found |= search_early(root, "fsdp2", sharded_trainer, whole_weights)
    found |= search_late(root, "fsdp2", one_label, whole_weights, LATE, **ONE_ROW)
    by_gradient = sharded_trainer(root / "gradient", BY_GRADIENT, **STEPS)
    by_gradient.train()
    assert by_gradient.is_fsdp_enabled
    assert by_gradient.accelerator.num_processes == 2
    found |= {f"gradient/mask/{key}": one for key, one in by_gradient.ticket.masks().items()}
    leave_found(found, root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder, and by search and kind the whole tensors that both processes came to."""
    folder = tmp_path_factory.mktemp("fsdp2-search")
    run_two(__name__, "run_one_process", folder)
    return folder, found_by_both(folder)


def alone(folder: Path, config: object, **options: object):
    trainer = plain_trainer(folder, config, 4, **STEPS, **options)
    trainer.train()
    return trainer


def test_the_ticket_is_that_of_one_process_and_weights_are_rewound(sharded, tmp_path):
    trainer = alone(tmp_path, EARLY, **EVALUATED)
    for name in ("ddp-early", "fsdp2-early"):
        check_early(sharded[0] / name, sharded[1][name], trainer)


def test_one_process_goes_on_with_a_search_of_two(sharded, tmp_path):
    """Between trainings; what it finds there are whole tensors."""
    folder, found = shutil.copytree(sharded[0] / "fsdp2-late", tmp_path / "search"), sharded[1]["fsdp2-late"]
    for checkpoint in folder.glob("checkpoint-*"):  # as if it was killed before any of the final training
        shutil.rmtree(checkpoint)
    model = partial(other_classifier, **ONE_ROW)
    trainer = plain_trainer(folder, LATE, 4, model=model, train_dataset=ONE_LABEL, **STEPS)
    output = trainer.train(resume_from_checkpoint=True)
    assert output.global_step == STEPS["max_steps"]
    assert_same(trainer.ticket.masks(), found["mask"])
    for name, weight in whole_weights(trainer.model).items():
        assert torch.allclose(weight, found["weight"][name], rtol=0, atol=2e-5), name


def test_late_rewinding_goes_to_the_step_of_the_dense_round(sharded, tmp_path):
    masks = alone(tmp_path, LATE, model=partial(tied_classifier, **ONE_ROW), train_dataset=ONE_LABEL).ticket.masks()
    check_late(sharded[0] / "fsdp2-late", sharded[1]["fsdp2-late"], masks)


def test_a_resumed_search_is_the_one_that_did_not_stop(sharded):
    for kind in ("mask", "weight"):
        assert_same(sharded[1]["fsdp2-resumed"][kind], sharded[1]["fsdp2-late"][kind])


def test_drawn_by_gradients(sharded, tmp_path):
    config = dataclasses.replace(BY_GRADIENT, score_batches=2)  # which are twice as large
    masks, found = alone(tmp_path, config).ticket.masks(), sharded[1]["gradient"]["mask"]
    assert sum(int((found[name] != mask).sum()) for name, mask in masks.items()) <= 2  # rounding
