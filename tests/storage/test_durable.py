"""Whatever goes wrong while writing, the old file or folder stays whole and nothing temporary is left."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparse_hf.storage import durable
from sparse_hf.storage.durable import write_file, write_folder, write_json


class Killed(BaseException):
    """Stands for SIGKILL as far as Python can: nothing that catches Exception sees it."""


def listing(folder: Path) -> dict[str, str]:
    """Every file and its text, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path) -> None:
    (folder / "a").write_text("new a")
    (folder / "b").write_text("new b")


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_file_is_replaced_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "x" / "y" / "file"
    write_file(path, lambda partial: partial.write_text("one") and None)
    write_file(path, lambda partial: partial.write_text("two") and None)
    assert listing(tmp_path) == {"x/y/file": "two"}
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [Killed(), ValueError("no"), OSError(errno.EIO, "broken disk")])
def test_failure_inside_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_file(path, write)
    assert caught.value is error
    assert listing(tmp_path) == {"file": "old"}
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission was denied"),
    ],
)
def test_disk_errors_are_one_sentence_with_the_target(tmp_path, monkeypatch, number, reason):
    path = tmp_path / "file"
    path.write_text("old")

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=f"Could not save `{path}`: {reason}") as caught:
        write_file(path, lambda partial: partial.write_text("new") and None)
    assert caught.value.errno == number
    assert listing(tmp_path) == {"file": "old"}


def test_full_disk_under_safetensors_is_the_same_sentence(tmp_path):
    # As safetensors 0.8 does it: no OSError, the number only in the text, a file of its own left behind.
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial: Path) -> None:
        (partial.parent / ".tmpAbC123").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=f"Could not save `{path}`: the disk is full"):
        write_file(path, write)
    assert listing(tmp_path) == {"file": "old"}
    assert os.listdir(tmp_path) == ["file"]


def test_other_safetensors_errors_pass(tmp_path):
    def write(partial: Path) -> None:
        raise SafetensorError("header too small")

    with pytest.raises(SafetensorError, match="header too small"):
        write_file(tmp_path / "file", write)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_of_a_new_file_follow_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write_json(tmp_path / "json", {})
    write_file(tmp_path / "tensors", lambda partial: save_file({"a": torch.zeros(2)}, partial))
    write_folder(tmp_path / "folder", fill)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"json": mode, "tensors": mode, "folder": 0o777 & ~mask}


def test_flush_comes_before_the_rename(tmp_path, monkeypatch):
    events = []
    replace = Path.replace
    monkeypatch.setattr(durable, "_flush_to_disk", lambda path: events.append(f"flush {path.name}"))
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("rename") or replace(path, target))
    write_file(tmp_path / "file", lambda partial: None)
    assert events == ["flush file", "rename", f"flush {tmp_path.name}"]


def test_json_has_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": [float("nan"), 1.5, (float("inf"),)], "a": {"ä": -float("inf")}})
    assert json.loads(path.read_text()) == {"a": {"ä": None}, "b": [None, 1.5, [None]]}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "stale").write_text("old")
    write_folder(path, fill)
    assert listing(tmp_path) == {"folder/a": "new a", "folder/b": "new b"}
    assert os.listdir(tmp_path) == ["folder"]


def test_every_file_of_a_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "_flush_to_disk", lambda path: flushed.append(path.name))
    write_folder(tmp_path / "folder", fill)
    assert sorted(flushed) == sorted(["a", "b", "new", tmp_path.name])


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "full")])
def test_failure_inside_write_keeps_the_old_folder(tmp_path, error):
    path = tmp_path / "folder"
    write_folder(path, fill)

    def write(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_folder(path, write)
    assert listing(tmp_path) == {"folder/a": "new a", "folder/b": "new b"}
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("failing", [1, 2])
def test_failure_at_either_rename_brings_the_old_folder_back(tmp_path, monkeypatch, error, failing):
    path = tmp_path / "folder"
    write_folder(path, lambda folder: (folder / "a").write_text("old") and None)
    rename, calls = Path.rename, []

    def failing_rename(source: Path, target: Path) -> Path:
        calls.append(source.name)
        if len(calls) == failing:
            raise error
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    monkeypatch.setattr(durable, "swapped", lambda first, second: False)  # a system that needs the renames
    with pytest.raises(type(error)):
        write_folder(path, fill)
    assert listing(tmp_path) == {"folder/a": "old"}


def test_nested_error_names_the_folder_and_not_its_temporary_file(tmp_path):
    def write(folder: Path) -> None:
        def full(partial: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_file(folder / "inner", full)

    with pytest.raises(OSError, match=f"`{tmp_path / 'folder'}`") as caught:
        write_folder(tmp_path / "folder", write)
    assert "partial" not in str(caught.value)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    write_folder(real, lambda folder: (folder / "a").write_text("old") and None)
    link.symlink_to(real)
    write_folder(link, fill)
    assert link.is_symlink()
    assert listing(real) == {"a": "new a", "b": "new b"}
