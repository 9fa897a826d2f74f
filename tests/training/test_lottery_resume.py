"""A search that was killed at any moment and resumed finds the ticket of the search that was not, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

import sparse_hf
import training
from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training import for_one_training, lottery_search, search_journal
from sparse_hf.training.search_journal import SearchJournal
from training.tiny_training import (
    AtBegin,
    AtStep,
    Crash,
    CrashAt,
    assert_same_search,
    raise_at_call,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_trainer,
)


CONFIG = LotteryTicketConfig(sparsity=0.6, rounds=2, rewind_step=1, exclude="pooler.*")
# Dropout is 0.1. An epoch has four steps, so that every training ends in the middle of one.
OPTIONS = {
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The search that nobody stopped: masks, weights, and the folder."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("whole"), CONFIG, **OPTIONS)
    trainer.train()
    return ticket_masks(trainer), tensors(trainer.model), Path(trainer.args.output_dir)


def resume(folder, config=CONFIG, **options):
    """A new process, as far as possible: a new trainer around other weights, in another random state."""
    torch.manual_seed(77)
    options = {"model": tiny_classifier(seed=9), **OPTIONS, **options}
    resumed = tiny_trainer(folder, config, **options)
    resumed.train(resume_from_checkpoint=True)
    return resumed


@pytest.mark.parametrize("training_number", [1, 2, 3], ids=["dense round", "second round", "final training"])
@pytest.mark.parametrize("step", [1, 3], ids=["before the first checkpoint", "after one"])
def test_killed_while_training(tmp_path, whole, training_number, step):
    stopped = tiny_trainer(tmp_path, CONFIG, callbacks=[CrashAt(step, training_number)], **OPTIONS)
    with pytest.raises(Crash):
        stopped.train()
    assert_same_search(whole, resume(tmp_path))


KILLS = {
    "while the rewinding point is written": (for_one_training, "save_snapshot", 1),
    "after the dense round": (lottery_search, "draw_masks", 1),
    "after the second round": (lottery_search, "draw_masks", 2),
    "before the head is saved": (lottery_search, "save_snapshot", 2),
    "between pruning and saving the ticket": (Ticket, "save_pretrained", 2),
    "between the ticket and the journal": (SearchJournal, "save", 3),
    "after the journal of the last round": (Ticket, "save_pretrained", 3),
    "after the final training": (Ticket, "save_pretrained", 4),
    "before a checkpoint's last file": (TrainerState, "save_to_json", 5),
    "before the last file of the final training": (TrainerState, "save_to_json", 9),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_between(tmp_path, whole, moment, monkeypatch):
    with monkeypatch.context() as patched:
        raise_at_call(patched, *KILLS[moment])
        with pytest.raises(Crash):
            tiny_trainer(tmp_path, CONFIG, **OPTIONS).train()
    assert_same_search(whole, resume(tmp_path))


@pytest.mark.parametrize("moment", [(search_journal, "save_snapshot", 1), (SearchJournal, "save", 1)])
def test_killed_before_anything_was_written(tmp_path, whole, moment, monkeypatch):
    """Then the search begins with the model that is there."""
    with monkeypatch.context() as patched:
        raise_at_call(patched, *moment)
        with pytest.raises(Crash):
            tiny_trainer(tmp_path, CONFIG, **OPTIONS).train()
    assert_same_search(whole, resume(tmp_path, model=tiny_classifier()))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "sparse_masks.safetensors", "trainer_state.json"]
)
def test_a_cut_off_checkpoint_is_passed_over(tmp_path, whole, name):
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, CONFIG, callbacks=[CrashAt(5, 2)], **OPTIONS).train()
    file = tmp_path / "round-2" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    begins = []
    resumed = tiny_trainer(tmp_path, CONFIG, model=tiny_classifier(seed=9), **OPTIONS)
    resumed.add_callback(AtBegin(lambda state, **_: begins.append(state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert begins == [2, 0]
    assert_same_search(whole, resumed)


def test_a_finished_search_is_found_finished(tmp_path, whole):
    tiny_trainer(tmp_path, CONFIG, **OPTIONS).train()
    steps = AtStep(lambda **_: None)
    resumed = resume(tmp_path, callbacks=[steps])
    assert steps.calls == 0
    assert_same_search(whole, resumed)


def test_the_same_trainer_goes_on_after_an_error(tmp_path, whole):
    trainer = tiny_trainer(tmp_path, CONFIG, callbacks=[CrashAt(3, 2)], **OPTIONS)
    with pytest.raises(Crash):
        trainer.train()
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.search.round == 0
    trainer.train(resume_from_checkpoint=True)
    assert_same_search(whole, trainer)


def test_without_checkpoints_a_round_is_repeated(tmp_path, whole):
    without = {"save_strategy": "no"}
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, CONFIG, callbacks=[CrashAt(4, 2)], **{**OPTIONS, **without}).train()
    assert_same_search(whole, resume(tmp_path, **without))


def test_checkpoints_without_an_optimizer_are_not_continued(tmp_path, whole):
    only_model = {"save_only_model": True}
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, CONFIG, callbacks=[CrashAt(4, 2)], **{**OPTIONS, **only_model}).train()
    assert_same_search(whole, resume(tmp_path, **only_model))


SCRIPT = """
import os, signal, sys
from training.test_lottery_resume import CONFIG, OPTIONS
from training.tiny_training import AtStep, tiny_trainer
begun = []
def kill(step, **_):
    begun.append(step)
    if begun == [1, 2, 3, 4, 5, 1, 2, 3]:
        os.kill(os.getpid(), signal.SIGKILL)
tiny_trainer(sys.argv[1], CONFIG, callbacks=[AtStep(kill)], **OPTIONS).train()
"""


@pytest.mark.slow
def test_a_real_kill(tmp_path, whole):
    paths = [Path(sparse_hf.__file__).parents[1], Path(next(iter(training.__path__))).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert (tmp_path / "round-2" / "checkpoint-2").is_dir()
    assert_same_search(whole, resume(tmp_path))
