"""The recipe's modes, a few steps each, by the command a user types."""

import json
import runpy
from pathlib import Path

import pytest

from sparse_hf import EarlyBirdConfig, StructuredTicket, load_slim
from sparse_hf.anatomy.units import find_units


RECIPE = "earlybert_glue.py"
STEPS = 4
BUDGET = ("--heads", "0.5", "--neurons", "0.5")
SEARCH = ("--mode", "search", *BUDGET, "--draw_at", "3")


def counts_of(folder: Path) -> dict[str, int]:
    return {one.key: one.count for one in find_units(load_slim(folder))}


def losses(*results: dict) -> set[tuple]:
    return {(result["eval_loss"], result["eval_accuracy"], result["parameters"]) for result in results}


def test_search_then_its_ticket_then_controls(run, places, capsys):
    root = places["root"]
    found = run("search", *SEARCH)
    assert "Drawn at step 3; the mask's way there is in" in capsys.readouterr().out
    assert (root / "search" / "mask_distances.png").is_file()
    ticket = StructuredTicket.from_pretrained(root / "search" / "ticket")
    counts = counts_of(root / "search")
    assert counts == ticket.counts()
    assert [counts[f"encoder.layer.{layer}.heads"] for layer in (0, 1)] == [1, 1]
    assert sum(counts[f"encoder.layer.{layer}.neurons"] for layer in (0, 1)) == 32
    assert json.loads((root / "search" / "train_results.json").read_text())["early_bird_drawn_at"] == 3

    with pytest.raises(FileExistsError, match="already holds a search"):
        run("search", *SEARCH)
    assert len(losses(found, run("search", *SEARCH, "--resume_from_checkpoint", "true"))) == 1

    given = ("--ticket", str(root / "search" / "ticket"))
    assert run("ticket", "--mode", "ticket", *given)["parameters"] == found["parameters"]
    assert counts_of(root / "ticket") == counts
    assert run("shuffled", "--mode", "random", *given)["parameters"] == found["parameters"]
    assert counts_of(root / "shuffled") == counts
    for mode in ("random", "magnitude"):
        assert run(mode, "--mode", mode, *BUDGET)["parameters"] == found["parameters"]
    dense = run("dense", "--mode", "dense")
    assert dense["parameters"] > found["parameters"]
    assert counts_of(root / "dense")["encoder.layer.0.heads"] == 2


def test_a_killed_search_goes_on(run, places, monkeypatch):
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    whole = run("whole", *SEARCH, *saving)
    save = StructuredTicket.save_pretrained
    monkeypatch.setattr(StructuredTicket, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("killed", *SEARCH, *saving)
    monkeypatch.setattr(StructuredTicket, "save_pretrained", save)
    resumed = run("killed", *SEARCH, *saving, "--resume_from_checkpoint", "true")
    assert len(losses(whole, resumed)) == 1
    tickets = [StructuredTicket.from_pretrained(places["root"] / name / "ticket") for name in ("whole", "killed")]
    assert tickets[0].distance(tickets[1]) == 0


def test_a_ticket_mode_without_ticket_says_so(run):
    with pytest.raises(ValueError, match="needs `--ticket`"):
        run("none", "--mode", "ticket")


@pytest.mark.parametrize(("text", "moment"), [("3", 3), ("0.2", 0.2), ("1.0", 1.0), (None, None)])
def test_a_decimal_point_makes_epochs(text, moment):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / RECIPE))
    arguments = recipe["Arguments"](draw_at=text, l1=0.5, uniform=True)
    config = recipe["config_of"](arguments)
    assert config == EarlyBirdConfig(draw_at=moment, l1=0.5, uniform=True)
    assert type(config.draw_at) is type(moment)
