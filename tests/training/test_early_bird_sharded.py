"""Two processes that shard a model by FSDP2 draw the early-bird ticket of one process, and train the smaller model."""

from functools import partial
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor

from training.bird_processes import (
    CONFIG,
    OPTIONS,
    bird,
    check_cut,
    check_search,
    cut_only,
    search_killed,
    search_whole,
)
from training.test_fsdp2 import FSDP, pretend_to_be_on_gpus
from training.tiny_training import AtStep, assert_same
from training.two_processes import found_by_both, leave_found, run_two
from training.zero_processes import plain_trainer


pytestmark = pytest.mark.slow


def sharded_trainer(folder: Path, config: object, state: str = "FULL_STATE_DICT", **options: object):
    pretend_to_be_on_gpus()
    own = {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": state}}
    trainer = plain_trainer(folder, config, 2, accelerator_config={"use_configured_state": True}, **own, **options)
    assert trainer.is_fsdp_enabled
    assert trainer.accelerator.num_processes == 2
    trainer.add_callback(AtStep(look_at_parts))
    return trainer


def look_at_parts(model, **_: object) -> None:
    """Both trainings are of shards, coefficients included."""
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model) -> dict:
    state = model.state_dict().items()
    return {name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for name, one in state}


def run_one_process(folder: str) -> None:
    """What each of the two processes does."""
    root = Path(folder)
    found = search_whole(root, "fsdp2", sharded_trainer, whole_weights)
    found |= search_killed(root, "fsdp2", partial(sharded_trainer, state="SHARDED_STATE_DICT"), whole_weights)
    found |= cut_only(root, "fsdp2", sharded_trainer, whole_weights)
    leave_found(found, root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder, and by search and kind the whole tensors that both processes came to."""
    folder = tmp_path_factory.mktemp("fsdp2-bird")
    run_two(__name__, "run_one_process", folder)
    return folder, found_by_both(folder)


def test_the_draw_and_the_smaller_model_are_those_of_one_process(sharded, tmp_path):
    trainer = plain_trainer(tmp_path, CONFIG, 4, model=bird, **OPTIONS)
    trainer.train()
    check_search(sharded[0] / "fsdp2-whole", sharded[1]["fsdp2-whole"], trainer)


def test_a_resumed_search_is_the_one_that_did_not_stop(sharded):
    for kind, values in sharded[1]["fsdp2-whole"].items():
        assert_same(sharded[1]["fsdp2-killed"][kind], values)


def test_the_smaller_model_begins_at_slices_of_the_start(sharded):
    check_cut(sharded[1]["fsdp2-cut"])
