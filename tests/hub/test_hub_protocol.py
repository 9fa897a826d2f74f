"""The Hub of these tests answers the real client as the real one does."""

import pytest
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub.hub_server import hub as hub  # a fixture


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return made


def push(folder, name="me/x", **options):
    api = HfApi()
    api.create_repo(name, exist_ok=True, **options)
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message="first")


def test_a_folder_comes_back_as_it_went(hub, folder):
    pushed = push(folder)
    found = snapshot_download("me/x")
    assert {path.name: path.read_bytes() for path in folder.iterdir()}.items() <= hub.files("me/x").items()
    with open(f"{found}/model.safetensors", "rb") as stream:
        assert stream.read() == (folder / "model.safetensors").read_bytes()
    assert found.endswith(pushed.oid)
    assert HfApi().model_info("me/x").sha == pushed.oid
    assert "PUT /objects/<oid>" in hub.requests  # the weights went to the storage, the config into the commit
    assert "GET /objects/<oid>" in hub.requests


def test_a_second_push_sends_only_what_changed(hub, folder):
    push(folder)
    hub.requests.clear()
    (folder / "config.json").write_text('{"changed": true}')
    push(folder)
    assert "PUT /objects/<oid>" not in hub.requests
    assert hub.text("me/x", "config.json") == '{"changed": true}'


def test_revisions_stay(hub, folder):
    first = push(folder)
    HfApi().create_tag("me/x", tag="v1")
    (folder / "config.json").write_text('{"later": 1}')
    push(folder)
    for revision in (first.oid, "v1"):
        with open(hf_hub_download("me/x", "config.json", revision=revision)) as stream:
            assert stream.read() == "{}"
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/x", "config.json", revision="v2")


def test_who_may_do_what(hub, folder):
    push(folder, "me/secret", private=True)
    assert HfApi(token="hf_me").model_info("me/secret").private
    for token in ("hf_you", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("me/secret")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_you").create_repo("me/other")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_nobody").whoami()
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_repo("me/secret")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/secret", "absent.json")
    assert HfApi().whoami()["name"] == "me"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_tried_again(hub, folder, status):
    push(folder)
    hub.fail("GET /objects/", status)
    hub.fail("PUT /objects/", status)
    (folder / "model.safetensors").write_bytes(b"other" * 10)
    if status == 429:
        push(folder)
        snapshot_download("me/x")
        assert len(hub.slept) == 2
    else:
        push(folder)  # an upload is tried again; a download that fails with 5xx is not
        with pytest.raises(HfHubHTTPError, match=str(status)):
            snapshot_download("me/x")


def test_how_long_to_wait_is_the_servers_word(hub, folder):
    hub.fail("POST /api/models/me/x/preupload", 429, headers={"Retry-After": "7"})
    push(folder)
    assert hub.slept == [8.0]


def test_a_dropped_connection_is_resumed_where_it_broke(hub, folder):
    hub.fail("PUT /objects/", after=100)
    push(folder)
    hub.fail("GET /objects/", after=1000)
    found = snapshot_download("me/x")
    with open(f"{found}/model.safetensors", "rb") as stream:
        assert stream.read() == (folder / "model.safetensors").read_bytes()
    assert hub.ranges == ["bytes=1000-"]


def test_a_card_with_bad_metadata_is_refused(hub, folder):
    ModelCard("---\nlicense: mit\nbase_model: you/base\n---\nfine").save(folder / "README.md")
    push(folder)
    assert HfApi().model_info("me/x").card_data.license == "mit"
    (folder / "README.md").write_text("---\nbase_model: /home/me/base model\n---\n")
    with pytest.raises((ValueError, HfHubHTTPError), match="base_model"):
        push(folder)


def test_what_git_ignores_stays_here(hub, folder):
    (folder / ".gitignore").write_text("/round-*/\n/start.safetensors\n")
    (folder / "round-1").mkdir()
    (folder / "round-1" / "optimizer.pt").write_bytes(b"x")
    (folder / "start.safetensors").write_bytes(b"x")
    push(folder)
    assert set(hub.files("me/x")) == {".gitattributes", ".gitignore", "config.json", "model.safetensors"}
