"""A rank is killed while masks change or are saved; started again, the run comes to the same result."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.training import callback
from training.test_fsdp2 import CASES, sharded_trainer, whole_weights
from training.tiny_training import assert_same
from training.two_processes import found_by_both, launch, leave_found, run_two


SAVING = {"save_strategy": "steps", "save_steps": 2, "state": "SHARDED_STATE_DICT"}


def trainer_in(folder: Path):
    return sharded_trainer(folder, CASES["gradual"], **SAVING)


def kill_at_call(module: object, name: str, number: int) -> None:
    """This process ends without a word when `module.name` is called for the `number`-th time."""
    function, calls = getattr(module, name), []

    def count(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(module, name, count)


def killed_in_update(folder: str) -> None:
    """The second rank, in the middle of the sums by which the masks of step 4 are drawn."""
    trainer = trainer_in(Path(folder) / "update")
    change = callback.SparsityCallback.on_optimizer_step

    def dangerous(self: object, args: object, state: object, *rest: object, **named: object) -> None:
        if state.global_step == 3 and os.environ["RANK"] == "1":
            kill_at_call(dist, "all_reduce", 4)
        change(self, args, state, *rest, **named)

    callback.SparsityCallback.on_optimizer_step = dangerous
    trainer.train()


def killed_in_save(folder: str) -> None:
    """The first rank, when it has written the weights of step 4 and is about to write their masks."""
    if os.environ["RANK"] == "0":
        kill_at_call(callback, "save_bits", 2)
    trainer_in(Path(folder) / "save").train()


def go_on(folder: str) -> None:
    """Both runs are resumed; a third one was never disturbed."""
    found = {}
    for name in ("update", "save", "undisturbed"):
        trainer = trainer_in(Path(folder) / name)
        trainer.train(resume_from_checkpoint=name != "undisturbed")
        found |= {f"{name}/weight/{key}": one for key, one in whole_weights(trainer).items()}
        found |= {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}
    leave_found(found, Path(folder))


@pytest.mark.slow
def test_the_restarted_run_is_the_undisturbed_one(tmp_path):
    for name in ("update", "save"):
        ended = launch(2, __name__, f"killed_in_{name}", tmp_path)
        assert ended.returncode != 0, ended.stdout.decode()[-6000:]
    assert sorted(path.name for path in (tmp_path / "update").iterdir()) == ["checkpoint-2"]
    assert (tmp_path / "save/checkpoint-4").is_dir()
    assert not (tmp_path / "save/checkpoint-4" / MASKS_FILE).exists()
    run_two(__name__, "go_on", tmp_path)
    found = found_by_both(tmp_path)
    for name in ("update", "save"):
        assert_same(found[name]["mask"], found["undisturbed"]["mask"])
        assert_same(found[name]["weight"], found["undisturbed"]["weight"])
