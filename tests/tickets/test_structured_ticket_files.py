"""A structured ticket on disk and on the Hub: saved as a whole, read with suspicion."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_hf.algorithms.bits import pack_bits
from sparse_hf.storage.file_names import DESCRIPTION_FILE, UNITS_FILE
from sparse_hf.storage.mask_file import FORMAT, MASKS_FILE, save_bits
from sparse_hf.tickets import structured_ticket, ticket_folder
from sparse_hf.tickets.origin import TicketOrigin
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.tickets.ticket import Ticket


ORIGIN = TicketOrigin(method="early_bird", config={"heads": 0.5}, base_model="me/base", model_type="bert")


def bools(text):
    return torch.tensor([digit == "1" for digit in text])


def ticket(first="1100"):
    """Two layers of 4 heads and 10 neurons: 3 of 8 heads and 12 of 20 neurons stay."""
    masks = {"layer.0.heads": first, "layer.0.neurons": "1111111000"}
    masks |= {"layer.1.heads": "0010", "layer.1.neurons": "1111100000"}
    return StructuredTicket({key: bools(mask) for key, mask in masks.items()}, ORIGIN)


def same(one, other):
    assert list(one.units) == list(other.units)
    return all(torch.equal(mask, other.units[key]) for key, mask in one.units.items())


def test_round_trip(tmp_path):
    folder = tmp_path / "x" / "ticket"
    assert ticket().save_pretrained(folder) == folder
    assert sorted(os.listdir(folder)) == [DESCRIPTION_FILE, UNITS_FILE]
    read = StructuredTicket.from_pretrained(str(folder))
    assert same(read, ticket())
    assert read.origin == ORIGIN


@settings(max_examples=25)  # each is flushed to disk
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(\.[0-9]{1,2}){0,2}\.(heads|neurons)", fullmatch=True),
        st.lists(st.booleans(), min_size=1, max_size=20).filter(any),
        min_size=1,
        max_size=6,
    )
)
def test_any_units_come_back_in_their_order(tmp_path_factory, units):
    made = StructuredTicket({key: torch.tensor(mask) for key, mask in units.items()})
    assert same(StructuredTicket.from_pretrained(made.save_pretrained(tmp_path_factory.mktemp("t"))), made)


def test_neither_sorting_by_text_nor_by_number_gives_this_order(tmp_path):
    order = ["b.10.neurons", "b.10.heads", "b.9.heads", "a.2.heads", "a.11.heads"]
    StructuredTicket({key: bools("01") for key in order}).save_pretrained(tmp_path)
    assert list(StructuredTicket.from_pretrained(tmp_path).units) == order
    layers = json.loads((tmp_path / DESCRIPTION_FILE).read_text())["layers"]
    assert [layer["layer"] for layer in layers] == ["b.10", "b.9", "a.2", "a.11"]


def test_description_counts_in_all_and_per_layer(tmp_path):
    content = json.loads((ticket().save_pretrained(tmp_path) / DESCRIPTION_FILE).read_text())
    assert (content["kind"], content["method"]) == ("structured_ticket", "early_bird")
    assert content["units"] == {"heads": 8, "kept_heads": 3, "neurons": 20, "kept_neurons": 12}
    first, second = content["layers"]
    assert first == {"layer": "layer.0", "heads": 4, "kept_heads": 2, "neurons": 10, "kept_neurons": 7}
    assert (second["kept_heads"], second["kept_neurons"]) == (1, 5)


def test_an_older_structured_ticket_is_replaced_and_nothing_else(tmp_path):
    ticket("1111").save_pretrained(tmp_path / "t")
    ticket().save_pretrained(tmp_path / "t")
    assert same(StructuredTicket.from_pretrained(tmp_path / "t"), ticket())
    Ticket.from_masks({"a": bools("10")}).save_pretrained(tmp_path / "other")
    with pytest.raises(FileExistsError, match=f"must be new or hold an older ticket, found '{MASKS_FILE}'"):
        ticket().save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("told_by", [{DESCRIPTION_FILE, UNITS_FILE}, {DESCRIPTION_FILE}, {UNITS_FILE}], ids=sorted)
def test_ticket_says_what_reads_a_structured_one(tmp_path, told_by):
    ticket().save_pretrained(tmp_path)
    for file in {DESCRIPTION_FILE, UNITS_FILE} - told_by:
        (tmp_path / file).unlink()
    told = f"holds a structured ticket and no `{MASKS_FILE}`. Read it with `StructuredTicket.from_pretrained`."
    with pytest.raises(ValueError, match=told):
        Ticket.from_pretrained(tmp_path)


@pytest.mark.parametrize("told_by", [{DESCRIPTION_FILE, MASKS_FILE}, {DESCRIPTION_FILE}, {MASKS_FILE}], ids=sorted)
def test_a_ticket_of_single_weights_says_what_reads_it(tmp_path, told_by):
    Ticket.from_masks({"a.weight": bools("10")}).save_pretrained(tmp_path)
    for file in {DESCRIPTION_FILE, MASKS_FILE} - told_by:
        (tmp_path / file).unlink()
    told = f"holds a ticket of single weights and no `{UNITS_FILE}`. Read it with `Ticket.from_pretrained`."
    with pytest.raises(ValueError, match=told):
        StructuredTicket.from_pretrained(tmp_path)


def test_folder_without_a_ticket(tmp_path):
    told = f"`{tmp_path / UNITS_FILE}` does not exist. The folder of a structured ticket holds `{UNITS_FILE}`."
    with pytest.raises(FileNotFoundError, match=told):
        StructuredTicket.from_pretrained(tmp_path)


def test_masks_without_description_are_a_ticket_of_unknown_origin(tmp_path):
    (ticket().save_pretrained(tmp_path) / DESCRIPTION_FILE).unlink()
    assert StructuredTicket.from_pretrained(tmp_path).origin == TicketOrigin()


def test_fields_that_are_missing_are_not_recorded_and_the_summary_is_not_trusted(tmp_path):
    ticket().save_pretrained(tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text('{"method": "early_bird", "units": {"heads": -1}, "layers": 7}')
    read = StructuredTicket.from_pretrained(tmp_path)
    assert same(read, ticket())
    assert read.origin == TicketOrigin(method="early_bird")


@pytest.mark.parametrize("content", ["[]", "", "{", '{"method": 3}', '{"config": [1]}', '{"model_parameters": 0}'])
def test_hostile_description(tmp_path, content):
    ticket().save_pretrained(tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text(content)
    with pytest.raises(ValueError, match=DESCRIPTION_FILE):
        StructuredTicket.from_pretrained(tmp_path)


def test_a_kind_that_is_no_text_is_refused(tmp_path):
    (tmp_path / DESCRIPTION_FILE).write_text('{"kind": ["ticket"]}')
    with pytest.raises(ValueError, match="`kind` in `.*` must be a str"):
        StructuredTicket.from_pretrained(tmp_path)


def test_truncated_masks(tmp_path):
    path = ticket().save_pretrained(tmp_path) / UNITS_FILE
    content = path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"`{path}` is not a usable mask file"):
            StructuredTicket.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ({}, "it has no masks"),
        (
            {"a.heads": bools("10"), "encoder.layer.0.weight": bools("10")},
            "'encoder.layer.0.weight' must be a layer's",
        ),
        ({"heads": bools("10")}, "'heads' must be a layer's path"),
        ({"a.heads": bools("00")}, "the mask of `a.heads` keeps none of 2"),
        ({"a.heads": torch.ones(2, 2, dtype=torch.bool)}, "the mask of `a.heads` is 2-D torch.bool"),
    ],
)
def test_masks_that_are_no_structured_ticket(tmp_path, masks, problem):
    bits = {key: pack_bits(mask) for key, mask in masks.items()}
    save_bits(tmp_path / UNITS_FILE, bits, {key: tuple(mask.shape) for key, mask in masks.items()})
    told = f"`{tmp_path / UNITS_FILE}` is not a usable structured ticket: {problem}.*It is damaged or hostile."
    with pytest.raises(ValueError, match=told):
        StructuredTicket.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd.heads", "a..heads", "\x1b[2J.heads", "a" * 10_000 + ".heads"])
def test_hostile_names(tmp_path, name):
    metadata = {"format": FORMAT, "shapes": json.dumps({name: [8]})}
    save_file({name: torch.ones(1, dtype=torch.uint8)}, tmp_path / UNITS_FILE, metadata=metadata)
    with pytest.raises(ValueError, match="is not a parameter name") as caught:
        StructuredTicket.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("shape", [[2**39], [2**39, 2**39], [9], [0], [-8], [True], "8"], ids=str)
def test_shape_bombs(tmp_path, shape):
    metadata = {"format": FORMAT, "shapes": json.dumps({"a.heads": shape})}
    save_file({"a.heads": torch.ones(1, dtype=torch.uint8)}, tmp_path / UNITS_FILE, metadata=metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is not a usable mask file"):
        StructuredTicket.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_push_to_hub_uploads_what_from_pretrained_reads(monkeypatch):
    pushed = {}

    def publish(folder, *options):
        pushed.update(read=StructuredTicket.from_pretrained(folder), folder=Path(folder), options=options)
        return "https://hub/commit/1"

    monkeypatch.setattr(ticket_folder, "publish", publish)
    assert ticket().push_to_hub("me/t", private=True, token="s") == "https://hub/commit/1"
    assert same(pushed["read"], ticket())
    assert pushed["options"] == ("me/t", True, "s", "Upload structured ticket")
    assert not pushed["folder"].exists()


def test_from_pretrained_fetches_two_files_of_the_revision(tmp_path, monkeypatch):
    ticket().save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(structured_ticket, "local_folder", lambda *args: calls.append(args) or tmp_path)
    assert same(StructuredTicket.from_pretrained("me/t", revision="v1", token="s", cache_dir="c"), ticket())
    assert calls == [("me/t", [UNITS_FILE, DESCRIPTION_FILE], "v1", "s", "c")]
