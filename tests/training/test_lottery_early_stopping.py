"""Early stopping and `load_best_model_at_end` inside the rounds of a search, and what a kill does to them."""

from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from sparse_hf.training import lottery_search
from training.test_lottery_resume import CONFIG
from training.test_lottery_resume import OPTIONS as PLAIN
from training.tiny_training import (
    AtStep,
    Crash,
    CrashAt,
    assert_same_search,
    raise_at_call,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_rows,
    tiny_trainer,
)


OPTIONS = {
    **PLAIN,
    "max_steps": 7,
    "learning_rate": 3e-2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "save_total_limit": 3,
}


def stopping_trainer(folder, *callbacks, **more):
    options = {**OPTIONS, "eval_dataset": tiny_rows(8, seed=5), **more}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    return tiny_trainer(folder, CONFIG, callbacks=[stop, *callbacks], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    steps = []
    watch = AtStep(lambda step, **_: steps.append(step))
    trainer = stopping_trainer(tmp_path_factory.mktemp("whole"), watch)
    trainer.train()
    begins = [place for place, step in enumerate(steps) if step == 1] + [len(steps)]
    lengths = [end - begin for begin, end in zip(begins, begins[1:], strict=False)]
    return (ticket_masks(trainer), tensors(trainer.model), Path(trainer.args.output_dir)), lengths


def test_rounds_do_stop_early_and_each_has_the_full_patience(whole):
    _, lengths = whole
    assert len(lengths) == 3
    assert min(lengths) < 7
    assert min(lengths) > 2  # a round that kept the counter of the one before would stop at its first evaluations


@pytest.mark.parametrize("number", [2, 3])
def test_killed_at_the_last_step(tmp_path, whole, number):
    with pytest.raises(Crash):
        stopping_trainer(tmp_path, CrashAt(whole[1][number - 1], number)).train()
    resumed = stopping_trainer(tmp_path, model=tiny_classifier(seed=9))
    resumed.train(resume_from_checkpoint=True)
    assert_same_search(whole[0], resumed)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_after_a_round_had_stopped(tmp_path, whole, number, monkeypatch):
    with monkeypatch.context() as patched:
        raise_at_call(patched, lottery_search, "draw_masks", number)
        with pytest.raises(Crash):
            stopping_trainer(tmp_path).train()
    steps = []
    resumed = stopping_trainer(tmp_path, AtStep(lambda step, **_: steps.append(step)), model=tiny_classifier(seed=9))
    resumed.train(resume_from_checkpoint=True)
    assert len(steps) == sum(whole[1][number:])  # none in the round that was over
    assert_same_search(whole[0], resumed)


class Counter(TrainerCallback, ExportableState):
    """Counts optimizer steps, and notes where each training began to count."""

    def __init__(self) -> None:
        self.steps, self.begins = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begins.append(len(self.steps))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_counters_begin_anew_in_each_round_and_go_on_in_a_resumed_one(tmp_path):
    counter = Counter()
    crashing = [counter, CrashAt(4, 2)]
    stopped = tiny_trainer(tmp_path, CONFIG, callbacks=crashing, **PLAIN)
    with pytest.raises(Crash):
        stopped.train()
    assert counter.begins == [0, 0]
    assert counter.steps == [1, 2, 3, 4]
    stopped.train(resume_from_checkpoint=True)  # from the checkpoint after step 2
    assert counter.begins == [0, 0, 2, 0]
    assert counter in stopped.callback_handler.callbacks
    fresh = Counter()
    tiny_trainer(tmp_path / "whole", CONFIG, callbacks=[fresh], **PLAIN).train()
    assert fresh.begins == [0, 0, 0]
    assert fresh.steps == counter.steps == [1, 2, 3, 4, 5]
