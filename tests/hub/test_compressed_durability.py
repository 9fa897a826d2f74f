"""A save of a compressed checkpoint that is killed, or finds no room, leaves the older one whole."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from sparse_hf import save_compressed
from sparse_hf.storage import durable
from tiny_sparse import sparse_model


CALLS = ("write", "pwrite", "sendfile")  # of `os`, which Python does not tell about
EVENTS = ("os.mkdir", "os.rename")  # which it does
CLEARING = ("os.remove", "os.rmdir")


class Disk:
    """Calls `strike` before disk operation `number` (from 1 on) below a folder, as long as it is used in `with`.

    Removing files, for which there is always room, counts with `clearing`.
    """

    active: "Disk | None" = None

    def __init__(self, folder: object, number: int, strike: Callable[[], None], clearing: bool = True) -> None:
        self.folder, self.left, self.strike = str(folder), number, strike
        self.events = EVENTS + CLEARING if clearing else EVENTS

    def __enter__(self) -> "Disk":
        Disk.active = self
        return self

    def __exit__(self, *error: object) -> None:
        Disk.active = None

    def operate(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.strike()


def _told(event: str, arguments: tuple) -> None:
    disk = Disk.active
    if disk and (event in disk.events or (event == "open" and str(arguments[0]).startswith(disk.folder))):
        disk.operate()


sys.addaudithook(_told)


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    def watched(function):
        def call(*arguments, **options):
            if Disk.active:
                Disk.active.operate()
            return function(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", watched(lambda descriptor: None))  # takes long, and a kill spares the cache
    monkeypatch.setattr(durable, "swapped", watched(durable.swapped))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def dense_folder(folder, seed):
    """A checkpoint of two shards."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, shard in zip("ab", names, strict=True):
        save_file({name: torch.relu(torch.randn(40, 30, generator=random))}, folder / shard)
    places = '", "'.join(f'{name}": "{shard}' for name, shard in zip("ab", names, strict=True))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"{places}"}}}}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text(str(seed))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two dense folders, the older of them saved in `small`, and what both look like there."""
    old, new = (dense_folder(tmp_path / name, seed) for seed, name in enumerate(("old", "new")))
    reference = contents(save_compressed(new, tmp_path / "reference"))
    small = save_compressed(old, tmp_path / "saves" / "small")
    return old, new, small, contents(small), reference


def killed(number, save, folder):
    """Whether `save` was killed before its disk operation `number`, in a process of its own; False if it has fewer."""
    child = os.fork()
    if child == 0:
        try:
            with Disk(folder, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                save()
            os._exit(0)
        finally:  # whatever happened, this copy of the tests ends here
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def refusal(save):
    """The message of the error that `save` ends with, if it does."""
    try:
        save()
    except OSError as error:
        return [str(error)]
    return []


def test_killed_at_every_disk_operation(folders):
    old, new, small, before, after = folders
    found, number = [], 1
    while killed(number, lambda: save_compressed(new, small), small.parent):
        found.append(contents(small))
        assert found[-1] in (before, after), number
        if number % 10 == 0 or found[-1] != before:  # the next save works, and clears what was left
            save_compressed(old, small)
            assert [entry.name for entry in small.parent.iterdir()] == ["small"], number
            assert contents(small) == before
        else:
            for leftover in small.parent.glob(".small.*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        number += 1
    assert number > 50  # operations there were
    assert contents(small) == after
    assert found[0] == before
    assert found[-1] == after  # killed while it was clearing up


def test_killed_without_an_older_checkpoint(folders):
    _, new, small, _, after = folders
    for number in (1, 5, 20, 40):
        assert killed(number, lambda: save_compressed(new, small.parent / "other"), small.parent)
        assert not (small.parent / "other").exists()
    save_compressed(new, small.parent / "other")
    assert contents(small.parent / "other") == after
    assert sorted(entry.name for entry in small.parent.iterdir()) == ["other", "small"]


def test_a_model_killed_while_it_is_saved(folders):
    _, _, small, before, _ = folders
    model = sparse_model()
    for number in (3, 30):
        assert killed(number, lambda: save_compressed(model, small), small.parent)
        assert contents(small) == before
    save_compressed(model, small)
    assert [entry.name for entry in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_disk_that_is_full_or_read_only_at_any_operation(folders, number, reason):
    _, new, small, before, after = folders

    def refuse():
        raise OSError(number, os.strerror(number))

    messages, operation = [], 1
    disk = None
    while disk is None or disk.left <= 0:  # until a save has fewer operations
        disk = Disk(small.parent, operation, refuse, clearing=False)
        with disk:
            messages += refusal(lambda: save_compressed(new, small))
        assert contents(small) in (before, after), operation
        operation += 1
    assert len(messages) > 20
    assert all(f"Could not save `{small}`: " in message and reason in message for message in messages)
    assert contents(small) == after
    assert [entry.name for entry in small.parent.iterdir()] == ["small"]


def test_a_read_only_folder(folders):
    _, new, small, before, _ = folders
    small.parent.chmod(0o555)
    try:
        if os.access(small.parent, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(OSError, match="permission was denied. What was saved there before is untouched"):
            save_compressed(new, small)
    finally:
        small.parent.chmod(0o755)
    assert contents(small) == before
