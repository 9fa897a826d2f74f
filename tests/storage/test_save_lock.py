import multiprocessing
import os
import signal

import pytest

from sparse_hf.storage import durable
from sparse_hf.storage.durable import write_folder
from sparse_hf.storage.folder_swap import swapped
from sparse_hf.storage.save_lock import only_saver


def test_a_second_saver_is_refused_and_the_third_let_in(tmp_path):
    refused = pytest.raises(FileExistsError, match="Another process is saving")
    with only_saver(tmp_path / "a"), refused, only_saver(tmp_path / "a"):
        pass
    with only_saver(tmp_path / "a"), only_saver(tmp_path / "b"):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".a.lock", ".b.lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_goes(tmp_path):
    (tmp_path / ".a.x1.partial" / "new").mkdir(parents=True)
    (tmp_path / ".ab.x1.partial").mkdir()
    with only_saver(tmp_path / "a"):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".a.lock", ".ab.x1.partial"]


def test_the_only_copy_of_the_old_folder_comes_back(tmp_path):
    (tmp_path / ".a.x1.partial" / "old").mkdir(parents=True)
    (tmp_path / ".a.x1.partial" / "old" / "file").write_text("old")
    with only_saver(tmp_path / "a"):
        assert (tmp_path / "a" / "file").read_text() == "old"


def test_two_folders_change_places(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not swapped(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot")
    assert (tmp_path / "a" / "file").read_text() == "b"
    assert (tmp_path / "b" / "file").read_text() == "a"


def test_a_swap_that_the_system_refuses(tmp_path):
    (tmp_path / "a").mkdir()
    try:
        done = swapped(tmp_path / "a", tmp_path / "nowhere")
    except FileNotFoundError:
        done = False
    assert not done
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_is_replaced_with_and_without_a_swap(tmp_path, monkeypatch, can_swap):
    if not can_swap:
        monkeypatch.setattr(durable, "swapped", lambda first, second: False)
    for text in ("old", "new"):
        write_folder(tmp_path / "a", lambda folder, text=text: (folder / text).write_text(text) and None)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def _save_forever(path):
    for number in range(10**6):

        def write(folder, number=number):
            for part in range(3):
                (folder / str(part)).write_text(str(number))

        with only_saver(path):
            write_folder(path, write)


@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.2])
def test_killed_at_any_moment_the_folder_is_whole(tmp_path, seconds):
    path = tmp_path / "a"
    child = multiprocessing.get_context("fork").Process(target=_save_forever, args=(path,))
    child.start()
    while not path.exists():
        child.join(0.01)
    child.join(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with only_saver(path):
        assert len({(path / str(part)).read_text() for part in range(3)}) == 1
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".partial")] == []
