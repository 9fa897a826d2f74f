"""A ticket on disk and on the Hub: saved as a whole, read with suspicion."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets import ticket as ticket_module
from sparse_hf.tickets import ticket_folder
from sparse_hf.tickets.origin import TicketOrigin
from sparse_hf.tickets.ticket import Ticket


ORIGIN = TicketOrigin(
    method="lottery_ticket",
    config={"method": "lottery_ticket", "include": ["a"]},
    base_model="me/base",
    model_type="bert",
    model_parameters=100,
    metrics={"eval_loss": 0.5},
    versions={"torch": "2.13"},
)


def ticket(sparsity=0.5, origin=ORIGIN):
    return Ticket.from_masks({"a.weight": torch.arange(20).reshape(4, 5) >= 20 * sparsity}, origin)


def test_round_trip(tmp_path):
    folder = tmp_path / "x" / "ticket"
    assert ticket().save_pretrained(folder) == folder
    assert sorted(os.listdir(folder)) == [DESCRIPTION_FILE, MASKS_FILE]
    read = Ticket.from_pretrained(str(folder))
    assert read.distance(ticket()) == 0
    assert read.origin == ORIGIN


def test_description_has_every_denominator(tmp_path):
    ticket(0.25).save_pretrained(tmp_path / "t")
    content = json.loads((tmp_path / "t" / DESCRIPTION_FILE).read_text())
    assert content["kind"] == "ticket"
    assert content["sparsity"] == {
        "prunable_weights": 20,
        "kept_weights": 15,
        "of_prunable_weights": 0.25,
        "of_whole_model": 0.05,
    }


def test_a_diverged_metric_does_not_keep_a_ticket_from_being_saved(tmp_path):
    ticket(origin=TicketOrigin(metrics={"eval_loss": float("nan")})).save_pretrained(tmp_path / "t")
    assert Ticket.from_pretrained(tmp_path / "t").origin.metrics == {"eval_loss": None}


def test_an_older_ticket_is_replaced(tmp_path):
    ticket(0.5).save_pretrained(tmp_path / "t")
    ticket(0.75).save_pretrained(tmp_path / "t")
    assert Ticket.from_pretrained(tmp_path / "t").sparsity == 0.75
    assert os.listdir(tmp_path) == ["t"]


def test_an_empty_folder_is_taken(tmp_path):
    ticket().save_pretrained(tmp_path)
    assert Ticket.from_pretrained(tmp_path).sparsity == 0.5


@pytest.mark.parametrize("stranger", ["model.safetensors", "README.md", ".git"])
def test_a_folder_with_strangers_is_refused(tmp_path, stranger):
    (tmp_path / stranger).write_text("precious")
    with pytest.raises(FileExistsError, match=f"must be new or hold an older ticket, found '{stranger}'"):
        ticket().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [stranger]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "t").write_text("precious")
    with pytest.raises(FileExistsError, match="must be new or hold an older ticket, found a file"):
        ticket().save_pretrained(tmp_path / "t")
    assert (tmp_path / "t").read_text() == "precious"


def test_full_disk_names_the_folder_and_keeps_the_older_ticket(tmp_path, monkeypatch):
    folder = tmp_path / "t"
    ticket(0.5).save_pretrained(folder)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=f"Could not save `{folder}`: the disk is full. What was saved there before"):
        ticket(0.75).save_pretrained(folder)
    assert Ticket.from_pretrained(folder).sparsity == 0.5
    assert os.listdir(tmp_path) == ["t"]


def test_masks_without_description_are_a_ticket_of_unknown_origin(tmp_path):
    ticket().save_pretrained(tmp_path)
    (tmp_path / DESCRIPTION_FILE).unlink()
    assert Ticket.from_pretrained(tmp_path).origin == TicketOrigin()


def test_unknown_fields_of_a_later_version_are_ignored(tmp_path):
    ticket().save_pretrained(tmp_path)
    content = json.loads((tmp_path / DESCRIPTION_FILE).read_text())
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps({**content, "later": 1}))
    assert Ticket.from_pretrained(tmp_path).origin == ORIGIN


@pytest.mark.parametrize(
    "content",
    ["[]", "", "{", '{"method": 3}', '{"config": [1]}', '{"metrics": {"a": NaN}}', '{"model_parameters": true}']
    + ['{"model_parameters": 1.5}', '{"model_parameters": -5}', '{"model_parameters": 0}', '{"base_fingerprint": {}}']
    + ['{"config": {"a": ' + "[" * 400 + "]" * 400 + "}}", '{"method": ' + "[" * 1_000_000],
    ids=lambda text: text[:30],
)
def test_hostile_description(tmp_path, content):
    ticket().save_pretrained(tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text(content)
    with pytest.raises(ValueError, match=DESCRIPTION_FILE) as caught:
        Ticket.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 500


def test_folder_without_masks(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`{tmp_path / MASKS_FILE}` does not exist"):
        Ticket.from_pretrained(tmp_path)


def test_mask_file_without_masks(tmp_path):
    save_file({}, tmp_path / MASKS_FILE, metadata={"format": "sparse_hf.masks.v1", "shapes": "{}"})
    with pytest.raises(ValueError, match="holds no mask, so it is not a ticket"):
        Ticket.from_pretrained(tmp_path)


def test_missing_path_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither a folder here nor a Hub repository that could be reached"):
        Ticket.from_pretrained(tmp_path / "absent")


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    pushed = {}

    def publish(folder, repo_id, private, token, commit_message):
        pushed.update(read=Ticket.from_pretrained(folder), files=sorted(os.listdir(folder)), folder=Path(folder))
        pushed["options"] = (repo_id, private, token, commit_message)
        return "https://hub/commit/1"

    monkeypatch.setattr(ticket_folder, "publish", publish)
    assert ticket().push_to_hub("me/t", private=True, token="s") == "https://hub/commit/1"
    assert pushed["read"].distance(ticket()) == 0
    assert pushed["files"] == [DESCRIPTION_FILE, MASKS_FILE]
    assert pushed["options"] == ("me/t", True, "s", "Upload ticket")
    assert not pushed["folder"].exists()


def test_from_pretrained_fetches_two_files_of_the_revision(tmp_path, monkeypatch):
    ticket().save_pretrained(tmp_path / "t")
    calls = []
    monkeypatch.setattr(ticket_module, "local_folder", lambda *args: calls.append(args) or tmp_path / "t")
    assert Ticket.from_pretrained("me/t", revision="v1", token="s", cache_dir="c").sparsity == 0.5
    assert calls == [("me/t", [MASKS_FILE, DESCRIPTION_FILE], "v1", "s", "c")]
