"""A killed early-bird run, continued by a new trainer around other weights, ends bit-equal to one nobody stopped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training import early_bird_detector, early_bird_search, search_journal
from sparse_hf.training.search_journal import SearchJournal
from training.tiny_early_bird import bird_trainer, early_bird, fake_latency, whole_bert
from training.tiny_training import (
    AtBegin,
    AtStep,
    Crash,
    CrashAt,
    assert_same,
    raise_at_call,
    tensors,
)


# Settles at step 4, at which a checkpoint is written too.
CONFIG = early_bird(history=3, threshold=0.99)
# Dropout is 0.1. An epoch has four steps, so that both trainings end in the middle of one.
OPTIONS = {
    "max_steps": 7,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def outcome(trainer) -> tuple:
    """The ticket, the weights, the looks with their distances, and the coefficients of a finished run."""
    folder = trainer.search._folder
    (drawn,) = json.loads((folder / "search.json").read_text())["rounds"]
    drawn.pop("seconds")
    ticket = StructuredTicket.from_pretrained(folder / "ticket")
    assert_same(trainer.ticket.units, ticket.units)
    assert (trainer.search.drawn_at, trainer.search.steps) == (drawn["drawn_at"], drawn["steps"])
    return ticket.units, tensors(trainer.model), drawn, load_file(folder / "coefficients.safetensors")


def run(folder, config=CONFIG, **options):
    trainer = bird_trainer(folder, config, **{**OPTIONS, **options})
    trainer.train()
    return trainer


def resume(folder, config=CONFIG, **options):
    """A new process, as far as possible: a new trainer around other weights, in another random state."""
    torch.manual_seed(77)
    trainer = bird_trainer(folder, config, **{"model": whole_bert(seed=9), **OPTIONS, **options})
    output = trainer.train(resume_from_checkpoint=True)
    assert output.global_step == trainer.state.max_steps
    return trainer


def assert_same_outcome(whole: tuple, resumed: tuple) -> None:
    assert_same(whole[0], resumed[0])
    assert_same(whole[1], resumed[1])
    assert whole[2] == resumed[2]
    assert_same(whole[3], resumed[3])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run that nobody stopped came to."""
    found = outcome(run(tmp_path_factory.mktemp("whole")))
    assert found[2]["drawn_at"] == 4
    assert found[2]["settled"]
    return found


@pytest.mark.parametrize("training", [1, 2], ids=["the search", "the smaller model's training"])
@pytest.mark.parametrize("step", [1, 3], ids=["before the first checkpoint of", "after one of"])
def test_killed_while_training(tmp_path, whole, training, step):
    with pytest.raises(Crash):
        run(tmp_path, callbacks=[CrashAt(step, training)])
    assert (tmp_path / "ticket").is_dir() == (training == 2)
    assert_same_outcome(whole, outcome(resume(tmp_path)))


KILLS = {
    "before the masks of a checkpoint": (early_bird_detector, "save_bits", 2),
    "before the looks of a checkpoint": (early_bird_detector, "write_json", 2),
    "before the last file of the draw's checkpoint": (TrainerState, "save_to_json", 2),
    "after the draw's checkpoint": (early_bird_search, "write_file", 1),
    "before the ticket": (StructuredTicket, "save_pretrained", 1),
    "between the ticket and the journal": (SearchJournal, "save", 2),
    "between the draw and the cut": (early_bird_search, "cut_units", 1),
    "before the last file of the smaller model's checkpoint": (TrainerState, "save_to_json", 4),
    "after the training": (SearchJournal, "save", 3),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_between(tmp_path, whole, moment, monkeypatch):
    with monkeypatch.context() as patched:
        raise_at_call(patched, *KILLS[moment])
        with pytest.raises(Crash):
            run(tmp_path)
    assert_same_outcome(whole, outcome(resume(tmp_path)))


def test_the_draws_checkpoint_is_not_trained_on(tmp_path, whole, monkeypatch):
    """The search that is resumed from it has no step left."""
    with monkeypatch.context() as patched:
        raise_at_call(patched, StructuredTicket, "save_pretrained", 1)
        with pytest.raises(Crash):
            run(tmp_path)
    assert (tmp_path / "search" / "checkpoint-4").is_dir()
    steps = []
    resume(tmp_path, callbacks=[AtStep(lambda step, model, **_: steps.append((type(model).__name__[:4], step)))])
    assert steps == [("Slim", step) for step in range(1, 8)]


@pytest.mark.parametrize("moment", [(search_journal, "save_snapshot", 1), (SearchJournal, "save", 1)])
def test_killed_before_anything_was_written(tmp_path, whole, moment, monkeypatch):
    """Then the search begins with the model that is there."""
    with monkeypatch.context() as patched:
        raise_at_call(patched, *moment)
        with pytest.raises(Crash):
            run(tmp_path)
    assert_same_outcome(whole, outcome(resume(tmp_path, model=whole_bert())))


CUT_OFF = ["model.safetensors", "optimizer.pt", "mask_history.safetensors", "mask_history.json"]


@pytest.mark.parametrize("name", [*CUT_OFF, "trainer_state.json"])
def test_a_cut_off_checkpoint_is_passed_over(tmp_path, whole, name, monkeypatch):
    with monkeypatch.context() as patched:
        raise_at_call(patched, StructuredTicket, "save_pretrained", 1)
        with pytest.raises(Crash):
            run(tmp_path)
    file = tmp_path / "search" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    begins = []
    look = AtBegin(lambda state, **_: begins.append(state.global_step))
    assert_same_outcome(whole, outcome(resume(tmp_path, callbacks=[look])))
    assert begins == [2, 0]


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_without_the_looks_is_passed_over(tmp_path, whole, step):
    with pytest.raises(Crash):
        run(tmp_path, callbacks=[CrashAt(1, 2)])
    shutil.rmtree(tmp_path / "ticket")
    content = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**content, "rounds": []}))
    for number in range(step, 5, 2):
        (tmp_path / "search" / f"checkpoint-{number}" / "mask_history.json").unlink()
    begins = []
    look = AtBegin(lambda state, **_: begins.append(state.global_step))
    assert_same_outcome(whole, outcome(resume(tmp_path, callbacks=[look])))
    assert begins == [step - 2, 0]


def test_a_finished_run_is_found_finished(tmp_path, whole):
    run(tmp_path)
    steps = AtStep(lambda **_: None)
    resumed = resume(tmp_path, callbacks=[steps], save_steps=7)
    assert steps.calls == 0
    assert_same_outcome(whole, outcome(resumed))


def test_the_same_trainer_goes_on_after_an_error_in_the_search(tmp_path, whole):
    trainer = bird_trainer(tmp_path, CONFIG, callbacks=[CrashAt(3)], **OPTIONS)
    with pytest.raises(Crash):
        trainer.train()
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.search.stage == 0
    assert not any("sparse_hf" in name for name in tensors(trainer.model))
    trainer.train(resume_from_checkpoint=True)
    assert_same_outcome(whole, outcome(trainer))


@pytest.mark.parametrize("training", [1, 2])
def test_without_checkpoints_a_stage_is_repeated(tmp_path, whole, training):
    without = {"save_strategy": "no"}
    with pytest.raises(Crash):
        run(tmp_path, callbacks=[CrashAt(3, training)], **without)
    assert_same_outcome(whole, outcome(resume(tmp_path, **without)))


def test_killed_around_the_end_of_an_epoch(tmp_path, monkeypatch):
    """A draw at the end of an epoch, whose checkpoint is written after that."""
    options = {"max_steps": -1, "num_train_epochs": 2.0, "save_strategy": "epoch"}
    config = early_bird(draw_at=1.0, check_every=3, coefficients="fold")
    whole = outcome(run(tmp_path / "whole", config, **options))
    assert (whole[2]["drawn_at"], whole[2]["steps"]) == (4, [3, 4])
    with monkeypatch.context() as patched:
        raise_at_call(patched, early_bird_search, "write_file", 1)
        with pytest.raises(Crash):
            run(tmp_path / "killed", config, **options)
    with pytest.raises(Crash):
        resume(tmp_path / "killed", config, callbacks=[CrashAt(6, 2)], **options)
    assert_same_outcome(whole, outcome(resume(tmp_path / "killed", config, **options)))


def test_a_resumed_search_for_a_speedup_measures_no_second_time(tmp_path, monkeypatch):
    asked = fake_latency(monkeypatch)
    config = early_bird(heads=None, neurons=None, target_speedup=2.0, draw_at=4)
    whole = outcome(run(tmp_path / "whole", config))
    with pytest.raises(Crash):
        run(tmp_path / "killed", config, callbacks=[CrashAt(3)])
    assert_same_outcome(whole, outcome(resume(tmp_path / "killed", config)))
    assert len(asked) == 2


@pytest.mark.parametrize("training", [1, 2])
def test_a_resumed_run_does_not_say_what_it_saved(tmp_path, training):
    """It did not time the beginning."""
    with pytest.raises(Crash):
        run(tmp_path, callbacks=[CrashAt(3, training)])
    output = bird_trainer(tmp_path, CONFIG, **OPTIONS).train(resume_from_checkpoint=True)
    assert output.metrics["early_bird_drawn_at"] == 4
    assert output.metrics["early_bird_draw_seconds"] > 0
    assert not {"early_bird_step_ratio", "early_bird_saved_fraction"} & output.metrics.keys()
