"""Are DSEE's two trainings one call that can be killed anywhere?"""

import pytest
import torch

from sparse_hf import DseeTwoStageConfig
from sparse_hf.training import dsee_two_stages
from sparse_hf.training.search_journal import SearchJournal
from training.tiny_dsee import masks_of, tiny_dsee, zeros_in
from training.tiny_training import (
    AtStep,
    Crash,
    CrashAt,
    assert_same,
    raise_at_call,
    tensors,
    tiny_classifier,
    tiny_trainer,
)


CONFIG = DseeTwoStageConfig(0.5)
OPTIONS = dict(save_strategy="steps", save_steps=2)


def trainer_of(folder, config=CONFIG, model=None, **options):
    return tiny_trainer(folder, config, model=tiny_dsee() if model is None else model, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def test_masks_come_between_the_stages(tmp_path):
    seen = []
    look = AtStep(lambda step, model, **_: seen.append((step, zeros_in(model, "key"))))
    trainer = trainer_of(tmp_path, callbacks=[look])
    output = trainer.train()
    assert seen == [(step, 0.0) for step in range(1, 7)] + [(step, 0.5) for step in range(1, 7)]
    assert output.global_step == 6
    assert zeros_in(trainer.model, "query") + zeros_in(trainer.model, "value") == pytest.approx(1)


def test_the_second_stage_goes_on_from_the_first(tmp_path):
    values = []

    def look(step, model, **_):
        values.append(model.state_dict()["base_model.model.classifier.modules_to_save.default.weight"].clone())

    trainer_of(tmp_path, callbacks=[AtStep(look)], learning_rate=1e-3).train()
    across = (values[6] - values[5]).abs().max()
    assert 0 < across <= 2e-3  # one step of AdamW at most, not back to the start
    assert (values[5] - values[0]).abs().max() > across


def test_the_first_stage_has_its_own_length_and_rate(tmp_path):
    seen = []
    look = AtStep(lambda step, lr_scheduler, **_: seen.append((step, lr_scheduler.base_lrs[0])))
    config = DseeTwoStageConfig(0.5, first_epochs=0.5, first_learning_rate=0.03)
    trainer_of(tmp_path, config, callbacks=[look]).train()
    assert seen == [(1, 0.03), (2, 0.03)] + [(step, 0.01) for step in range(1, 7)]


KILLS = {
    "before anything was written": (SearchJournal, "save", 1),
    "after the first stage": (dsee_two_stages, "save_snapshot", 1),
    "before the journal says so": (SearchJournal, "save", 2),
    "before the last journal": (SearchJournal, "save", 3),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_between(tmp_path, whole, moment, monkeypatch):
    with monkeypatch.context() as patched:
        raise_at_call(patched, *KILLS[moment])
        with pytest.raises(Crash):
            trainer_of(tmp_path).train()
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(tensors(whole.model), tensors(resumed.model))


@pytest.mark.parametrize(("step", "stage"), [(1, 1), (3, 1), (1, 2), (5, 2)])
def test_killed_within(tmp_path, whole, step, stage):
    with pytest.raises(Crash):
        trainer_of(tmp_path, callbacks=[CrashAt(step, stage)]).train()
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert masks_of(resumed.model)
    assert_same(tensors(whole.model), tensors(resumed.model))


def test_the_frozen_weights_come_back(whole):
    base = whole.model.unload()
    start = tensors(tiny_classifier())
    for name, weight in tensors(base).items():
        if "classifier" not in name:
            assert torch.equal(weight, start[name]), name


def test_logs_name_the_stage(tmp_path):
    trainer = trainer_of(tmp_path, logging_strategy="steps", logging_steps=3)
    trainer.train()
    assert {record["stage"] for record in trainer.state.log_history if "loss" in record} == {2}


@pytest.mark.parametrize("kind", ["no adapter", "other config", "another run", "one checkpoint"])
def test_refused(tmp_path, kind):
    if kind == "no adapter":
        with pytest.raises(ValueError, match="exactly one active DSEE adapter, got none"):
            trainer_of(tmp_path, model=tiny_classifier())
        return
    trainer_of(tmp_path, max_steps=1).train()
    if kind == "other config":
        with pytest.raises(ValueError, match="was started with sparsity=0.5, got 0.25"):
            trainer_of(tmp_path, DseeTwoStageConfig(0.25)).train(resume_from_checkpoint=True)
    elif kind == "another run":
        with pytest.raises(FileExistsError, match="already holds a search"):
            trainer_of(tmp_path).train()
    else:
        with pytest.raises(ValueError, match="resumed by `resume_from_checkpoint=True`"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(("name", "value"), [("first_epochs", 0), ("first_learning_rate", -1.0)])
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0"):
        DseeTwoStageConfig(0.5, **{name: value})


def test_there_is_no_ticket(whole):
    with pytest.raises(RuntimeError, match="draws no ticket"):
        _ = whole.ticket
