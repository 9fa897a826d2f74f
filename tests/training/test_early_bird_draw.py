"""At which step is the ticket drawn?"""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl

from sparse_hf.tickets.draw_units import is_tied
from sparse_hf.training.early_bird_detector import EarlyBirdDetector
from training.tiny_early_bird import KEYS, bird_trainer, early_bird, settles_at
from training.tiny_training import AtStep


DETECTOR = "sparse_hf.training.early_bird_detector"
# Four units, of which half stay, in letters: a mask keeps the two that are named.
UNITS = "abcd"


class Scripted:
    """Stands for coefficients: at every look, the units of one layer that are named have the highest scores."""

    def __init__(self, *script: str) -> None:
        self.script = iter(script)
        self.rankings = []

    def scores(self, ranking):
        self.rankings.append(ranking)
        word = next(self.script)
        base = 0.0 if word == "tie" else 0.01
        values = [1.0 + base * number + (unit in word and word != "tie") for number, unit in enumerate(UNITS)]
        return {"layer.0.heads": torch.tensor(values), "layer.0.neurons": torch.arange(4.0)}


def drawn(*script: str, last: int = 99, **changes):
    """The detector after it looked at this script, a look per step, and whether it stopped the training."""
    config = early_bird(neuron_multiple=1, **{"longest": 99, "earliest": 1, "history": 2, "threshold": 0.0, **changes})
    detector, control = EarlyBirdDetector(Scripted(*script), config, 10), TrainerControl()
    for step in range(1, len(script) * config.check_every + 1):
        detector.on_step_end(None, SimpleNamespace(global_step=step, max_steps=last), control)
        if control.should_training_stop:
            break
    assert control.should_training_stop == (detector.drawn_at is not None)
    return detector


@pytest.mark.parametrize(
    ("script", "changes", "step"),
    [
        (["ab", "ab"], {}, 2),
        (["ab", "cd", "cd"], {}, 3),
        (["ab", "ac", "ab", "ac", "ab"], {}, None),  # one of two heads moves: 2 of 4 positions
        (["ab", "ac"], {"threshold": 0.49}, None),
        (["ab", "ac"], {"threshold": 0.5}, 2),
        (["ab", "bc", "cd"], {"threshold": 0.5, "history": 3}, None),  # near its neighbour, far from the oldest
        (["ab", "bc", "bc"], {"threshold": 0.5, "history": 3}, 3),
        (["ab", "ab", "ab", "ab"], {"earliest": 3}, 4),
        (["ab", "ab", "ab"], {"check_every": 3}, 6),
        (["ab", "ab", "ab"], {"check_every": 3, "earliest": 4}, 9),
        (["tie", "tie", "tie"], {}, None),
        (["ab", "tie", "ab", "ab"], {}, 4),
        (["ab", "ab"], {"earliest": 0.1}, 2),  # an epoch has 10 steps here
        (["ab", "ab", "ab", "ab"], {"earliest": 0.3}, 4),
    ],
)
def test_settled_by_hand(script, changes, step):
    detector = drawn(*script, **changes)
    assert detector.drawn_at == step
    assert detector.settled == (step is not None)


@pytest.mark.parametrize(("moment", "step"), [(3, 3), (0.25, 2), (0.01, 1), (1.0, 10)])
def test_a_fixed_draw_comes_exactly_there(moment, step, caplog):
    detector = drawn(*["ab"] * 12, draw_at=moment)
    assert (detector.drawn_at, detector.settled) == (step, False)
    assert not caplog.records  # nothing to warn of


def test_a_fixed_draw_between_two_looks():
    detector = drawn("ab", "cd", "ab", check_every=2, draw_at=3)
    assert [step for step, _ in detector.checks] == [2, 3]
    assert detector.masks["layer.0.heads"].tolist() == [False, False, True, True]
    assert detector.distances() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_the_ranking_is_the_configs(ranking):
    assert set(drawn("ab", "ab", ranking=ranking)._coefficients.rankings) == {ranking}


@pytest.mark.parametrize(("limits", "step"), [({"longest": 3}, 3), ({"longest": 0.4}, 4), ({"last": 2}, 2)])
def test_without_settling_it_is_drawn_at_the_longest(limits, step, caplog):
    detector = drawn("ab", "ac", "ab", "ac", "ab", **limits)
    assert (detector.drawn_at, detector.settled) == (step, False)
    (record,) = caplog.records
    assert f"had not settled by step {step} (distance 0.5, threshold 0.0)" in record.getMessage()


def test_a_draw_on_ties_is_warned_of(caplog):
    assert drawn("tie", "tie", draw_at=2).drawn_at == 2
    (record,) = caplog.records
    assert "drawn at step 2 on tied coefficients" in record.getMessage()


@pytest.mark.parametrize("settings", [(1e-2, 0.3), (3e-3, 0.4), (1e-2, 0.1)], ids=str)
def test_the_draw_is_at_the_first_look_that_settled(tmp_path, settings):
    """In a real search, what was looked at is enough to know when."""
    rate, threshold = settings
    config = early_bird(threshold=threshold, history=3, longest=8, earliest=2, coefficient_learning_rate=rate)
    trainer, scores = bird_trainer(tmp_path, config, max_steps=8), []
    search = trainer.search
    trainer.add_callback(AtStep(lambda **_: search.stage == 1 and scores.append(search._coefficients.scores())))
    trainer.train()
    looks = zip(scores, search._detector.checks, strict=True)
    tied = [is_tied(values, masks, config) for values, (_, masks) in looks]
    expected = settles_at(search.steps, search.distances, tied, config)
    assert search.drawn_at == (8 if expected is None else expected)
    assert search._detector.settled == (expected is not None)
    assert search.drawn_at >= 4  # two is the earliest, and three must agree
    assert search.steps == list(range(1, search.drawn_at + 1))


def test_coefficients_that_do_not_move_never_settle(tmp_path, caplog):
    config = early_bird(coefficient_learning_rate=1e-12, threshold=0.9, longest=5)
    with caplog.at_level(logging.WARNING, DETECTOR):
        trainer = bird_trainer(tmp_path, config)
        trainer.train()
    assert trainer.search.drawn_at == 5
    assert [record.name for record in caplog.records].count(DETECTOR) == 2
    text = caplog.text
    assert "drawn at step 5 on tied coefficients" in text
    assert "had not settled by step 5 (distance None" in text
    # Equal scores: the first heads of each layer, and the neurons that the tie rule of blocks says.
    assert [trainer.ticket.units[key].tolist() for key in KEYS[::2]] == [[True, True, False, False]] * 2
    assert sum(trainer.ticket.counts()[key] for key in KEYS[1::2]) == 32


def test_another_callback_that_ends_the_search_draws(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3 and not type(model).__name__.startswith("Slim"):
                control.should_training_stop = True

    trainer = bird_trainer(tmp_path, early_bird(check_every=2, draw_at=6), callbacks=[Stop()])
    output = trainer.train()
    assert (trainer.search.drawn_at, trainer.search.steps) == (3, [2, 3])
    assert output.global_step == 6
