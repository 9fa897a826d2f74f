"""Revisions, private repositories, and a Hub that fails: what is pushed and pulled then?"""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hub.hub_server import hub as hub  # a fixture
from sparse_hf import Ticket, publish
from sparse_hf.cards import card


OTHER = Ticket.from_masks({"layer.0.query.weight": torch.tensor([[True, False, True], [False, True, True]])})


@pytest.fixture(scope="module")
def ticket():
    return Ticket.from_masks({"layer.0.query.weight": torch.rand(64, 99, generator=torch.Generator()) > 0.6})


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Drawing takes most of the time of a push, and these tests are not about it."""
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)


def test_an_older_revision_stays_what_it_was(hub, ticket):
    first = ticket.push_to_hub("me/ticket").rpartition("/")[2]
    HfApi().create_tag("me/ticket", tag="v1")
    OTHER.push_to_hub("me/ticket")
    assert Ticket.from_pretrained("me/ticket").num_kept == 4
    for revision in (first, "v1"):
        assert Ticket.from_pretrained("me/ticket", revision=revision).num_kept == ticket.num_kept
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub repository"):
        Ticket.from_pretrained("me/ticket", revision="v2")


def test_a_private_ticket_needs_its_owners_token(hub, ticket):
    ticket.push_to_hub("me/secret", private=True)
    for token in (False, "hf_you", "hf_nobody"):
        with pytest.raises(FileNotFoundError, match="`me/secret` is neither a folder here nor a Hub repo") as caught:
            Ticket.from_pretrained("me/secret", token=token)
        assert "\n" not in str(caught.value)
    assert Ticket.from_pretrained("me/secret", token="hf_me").num_kept == ticket.num_kept


def test_without_leave_to_write_nothing_is_changed(hub, ticket):
    ticket.push_to_hub("me/ticket")
    for token, status in (("hf_you", "403"), (False, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            ticket.push_to_hub("me/ticket", token=token)
    assert len(hub.repositories.named["me/ticket"].commits) == 2


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([("PUT /objects/", 429), ("POST .*/objects/batch", 500)], id="too-many-requests-then-an-error"),
        pytest.param([("PUT /objects/", None), ("POST .*/preupload/", None)], id="dropped-while-pushing"),
        pytest.param([("GET /objects/", None), ("GET /objects/", 429)], id="dropped-while-pulling"),
    ],
)
def test_passing_faults_are_overcome(hub, ticket, faults):
    for pattern, status in faults:
        hub.fail(pattern, status, after=700)
    ticket.push_to_hub("me/ticket")
    pulled = Ticket.from_pretrained("me/ticket")
    assert all(torch.equal(pulled.bits[name], bits) for name, bits in ticket.bits.items())
    assert [fault.times for fault in hub.faults] == [0] * len(faults)  # all of them happened


def test_a_push_that_failed_at_the_end_is_taken_up_where_it_was(hub, ticket, tmp_path):
    folder = ticket.save_pretrained(tmp_path / "ticket")
    hub.fail("POST .*/commit/", 500)  # which the client does not try again
    with pytest.raises(HfHubHTTPError, match="500"):
        publish(folder, "me/ticket")
    assert set(hub.files("me/ticket")) == {".gitattributes"}
    hub.requests.clear()
    publish(folder, "me/ticket")
    assert "PUT /objects/<oid>" not in hub.requests  # the masks are there already
    assert Ticket.from_pretrained("me/ticket").num_kept == ticket.num_kept


def parts_sent(hub):
    """Numbers of the parts that were sent, in order."""
    return [int(line.rpartition("/")[2]) for line in hub.requests if line.startswith("PUT /objects/<oid>/")]


@pytest.mark.parametrize("status", [500, 503, 429, None], ids=["500", "503", "429", "dropped"])
def test_a_large_file_goes_in_parts_of_which_one_that_fails_is_sent_again(hub, ticket, status):
    hub.repositories.part_size = 300
    hub.fail("PUT /objects/.*/2$", status, after=100)
    ticket.push_to_hub("me/ticket")
    masks = hub.files("me/ticket")["sparse_masks.safetensors"]
    parts = -(-len(masks) // 300)
    assert parts > 2
    assert parts_sent(hub) == [1, 2, *range(2, parts + 1)]  # the first is not sent a second time
    pulled = Ticket.from_pretrained("me/ticket")
    assert all(torch.equal(pulled.bits[name], bits) for name, bits in ticket.bits.items())


@pytest.mark.parametrize("broken", ["PUT /objects/.*/2$", "POST /api/complete_multipart/"])
def test_parts_that_do_not_come_together_are_no_file(hub, ticket, tmp_path, broken):
    hub.repositories.part_size = 300
    folder = ticket.save_pretrained(tmp_path / "ticket")
    hub.fail(broken, 403)
    with pytest.raises((HfHubHTTPError, RuntimeError), match="403|uploading"):
        publish(folder, "me/ticket")
    assert not hub.repositories.objects
    assert set(hub.files("me/ticket")) == {".gitattributes"}
    hub.requests.clear()
    publish(folder, "me/ticket")
    size = len(hub.files("me/ticket")["sparse_masks.safetensors"])
    assert parts_sent(hub) == [*range(1, -(-size // 300) + 1)]
    assert Ticket.from_pretrained("me/ticket").num_kept == ticket.num_kept


def test_a_persons_card_in_the_repository_stays(hub, ticket):
    ticket.push_to_hub("me/ticket")
    ModelCard("---\nlicense: mit\n---\nmy own words").push_to_hub("me/ticket")
    OTHER.push_to_hub("me/ticket")
    assert hub.text("me/ticket", "README.md").endswith("my own words")
    assert Ticket.from_pretrained("me/ticket").num_kept == 4
