"""A folder is used as it is; anything else is asked of the Hub, in one sentence when that fails."""

import pytest

from sparse_hf.storage import locations
from sparse_hf.storage.locations import hub_source, local_folder


def test_a_folder_is_itself(tmp_path):
    assert local_folder(tmp_path, ["a"]) == tmp_path
    assert local_folder(str(tmp_path), ["a"]) == tmp_path


@pytest.mark.parametrize("name", ["me/absent-ticket", "not/a/repo/id", "./absent", "bad id!"])
def test_what_cannot_be_reached_is_one_sentence(name):
    # The Hub is switched off by HF_HUB_OFFLINE in conftest.py.
    with pytest.raises(FileNotFoundError, match="is neither a folder here nor a Hub repository") as caught:
        local_folder(name, ["a"])
    assert f"`{name}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_named_files_are_fetched(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        locations, "snapshot_download", lambda *args, **kwargs: calls.append((args, kwargs)) or str(tmp_path)
    )
    assert local_folder("me/x", ("a", "b"), revision="r", token="t", cache_dir="c") == tmp_path
    assert calls == [(("me/x",), dict(allow_patterns=["a", "b"], revision="r", token="t", cache_dir="c"))]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        local_folder(tmp_path / "file", ["a"])


def test_a_copy_in_the_hubs_cache_knows_what_it_is_a_copy_of(tmp_path):
    commit = "0123456789" * 4
    assert hub_source(tmp_path / "models--org--a-name" / "snapshots" / commit) == ("org/a-name", commit)
    assert hub_source(tmp_path / "models--gpt2" / "snapshots" / commit) == ("gpt2", commit)
    assert hub_source(tmp_path) == (str(tmp_path), None)
