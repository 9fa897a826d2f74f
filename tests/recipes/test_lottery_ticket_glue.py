"""The recipe's modes, two steps each, by the command a user types."""

import json

import pytest

from sparse_hf import Ticket


RECIPE = "lottery_ticket_glue.py"
STEPS = 2


def test_search_then_transfer_then_controls(run, places):
    found = run("search", "--mode", "search", "--sparsity", "0.5", "--rounds", "2")
    ticket = places["root"] / "search" / "ticket"
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (places["root"] / "search" / "model.safetensors").is_file()
    assert Ticket.from_pretrained(places["root"] / "search").distance(Ticket.from_pretrained(ticket)) == 0
    for mode in ("ticket", "reinit"):
        result = run(mode, "--mode", mode, "--ticket", str(ticket))
        assert result["sparsity"] == found["sparsity"]
        assert Ticket.from_pretrained(places["root"] / mode).distance(Ticket.from_pretrained(ticket)) == 0
    for mode in ("one_shot", "random"):
        assert run(mode, "--mode", mode, "--sparsity", "0.5")["sparsity"] == found["sparsity"]
    assert "sparsity" not in run("dense", "--mode", "dense")


def test_a_finished_search_is_not_overwritten_but_continued_on_request(run):
    again = ("--mode", "search", "--sparsity", "0.5", "--rounds", "1")
    first = run("again", *again)
    with pytest.raises(FileExistsError, match="already holds a search"):
        run("again", *again)
    assert run("again", *again, "--resume_from_checkpoint", "true")["eval_accuracy"] == first["eval_accuracy"]


def test_a_ticket_mode_without_ticket_says_so(run):
    with pytest.raises(ValueError, match="needs `--ticket`"):
        run("none", "--mode", "ticket")


def test_the_loss_is_a_mean_over_rows_however_they_come_together(run, places):
    run("at-once", "--mode", "dense")
    run("accumulated", "--mode", "dense", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    losses = [
        json.loads((places["root"] / name / "train_results.json").read_text())["train_loss"]
        for name in ("at-once", "accumulated")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
