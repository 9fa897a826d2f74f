"""What makes a search impossible is said before it begins; what breaks it later keeps what was found."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_hf.storage import mask_file
from sparse_hf.tickets.configs import LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.sharding_checks import check_search
from training.tiny_training import (
    AtBegin,
    AtStep,
    assert_same,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_rows,
    tiny_trainer,
)


def search(folder, model=None, config_changes=None, **options):
    config = LotteryTicketConfig(**{"sparsity": 0.5, "rounds": 2, **(config_changes or {})})
    return tiny_trainer(folder, config, model=model, **{"max_steps": 3, **options})


def assert_refused(trainer, error: type, match: str, **train: object) -> None:
    """The error comes before a step is trained or a file written."""
    folder = trainer.args.output_dir
    before = sorted(str(path) for path in Path(folder).rglob("*"))
    dense, steps = tensors(trainer.model), AtStep(lambda **_: None)
    trainer.add_callback(steps)
    with pytest.raises(error, match=match):
        trainer.train(**train)
    assert steps.calls == 0
    assert sorted(str(path) for path in Path(folder).rglob("*")) == before
    assert_same(dense, tensors(trainer.model))


def test_a_ready_made_optimizer(tmp_path):
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="new optimizer in each round, got a ready-made one"):
        search(tmp_path, model, optimizers=(optimizer, None))
    chosen = search(tmp_path, model, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    chosen.train()
    assert type(chosen.optimizer.optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"include": "nothing.*"}, "nothing"),
        ({"sparsity": 0.999}, "at least one weight in each of the 13 matrices, got 0.999 of 4352"),
        ({"round_steps": 4}, r"whole training on this data \(3 steps\), got `round_steps`=4"),
        ({"round_epochs": 2}, r"whole training on this data \(3 steps\), got `round_epochs`=2"),
        ({"rewind_step": 3}, "inside the first round of 3 steps, got 3"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, match):
    assert_refused(search(tmp_path, config_changes=changes), ValueError, match)


def test_checkpoints_that_cut_a_round_short(tmp_path):
    assert_refused(search(tmp_path, enable_jit_checkpoint=True), ValueError, "enable_jit_checkpoint")


def test_a_folder_with_a_search_is_not_overwritten(tmp_path):
    search(tmp_path).train()
    assert_refused(search(tmp_path), FileExistsError, "already holds a search")


def test_a_folder_with_another_run(tmp_path):
    other = tiny_trainer(tmp_path, StaticSparsityConfig(sparsity=0.5), save_strategy="steps", save_steps=6)
    other.train()
    assert_refused(search(tmp_path), FileExistsError, r"holds another run \(checkpoint-6\)")
    assert_refused(search(tmp_path), FileExistsError, "holds another run", resume_from_checkpoint=True)


def test_a_folder_that_lost_its_journal(tmp_path):
    search(tmp_path, save_strategy="steps", save_steps=1, config_changes={"final_training": False}).train()
    (tmp_path / "search.json").unlink()
    assert_refused(search(tmp_path), FileExistsError, r"holds another run \(round-1\)")


def test_another_config_or_model_on_resuming(tmp_path):
    search(tmp_path).train()
    other = search(tmp_path, config_changes={"sparsity": 0.6})
    assert_refused(other, ValueError, "started with sparsity=0.5, got 0.6", resume_from_checkpoint=True)
    wider = search(tmp_path, tiny_classifier(intermediate_size=48))
    assert_refused(wider, ValueError, "saved from another model|does not fit", resume_from_checkpoint=True)


def test_a_path_is_no_way_to_resume(tmp_path):
    for path in (tmp_path / "round-1" / "checkpoint-2", str(tmp_path / "round-1")):
        assert_refused(
            search(tmp_path), ValueError, "resumed by `resume_from_checkpoint=True`", resume_from_checkpoint=path
        )


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_nan_ends_the_search_and_keeps_finished_rounds(tmp_path, score):
    trainer = search(tmp_path, config_changes={"score": score})
    trainings = []

    def break_second(model, **_):
        trainings.append(1)
        if len(trainings) == 2:
            model.bert.encoder.layer[0].output.dense.bias.data.fill_(float("nan"))

    trainer.add_callback(AtBegin(break_second))
    with pytest.raises(ValueError, match="Round 2 ended with .*(NaN|nan).*finished rounds are kept"):
        trainer.train()
    assert len(json.loads((tmp_path / "search.json").read_text())["rounds"]) == 1
    assert Ticket.from_pretrained(tmp_path / "round-1" / "ticket").sparsity == pytest.approx(0.25, abs=1e-3)
    assert not (tmp_path / "round-2" / "ticket").exists()
    search(tmp_path, config_changes={"score": score}).train(resume_from_checkpoint=True)


def test_a_metric_that_is_no_number_does_not_break_the_search(tmp_path):
    trainer = search(
        tmp_path,
        eval_dataset=tiny_rows(4),
        eval_strategy="steps",
        eval_steps=3,
        compute_metrics=lambda _: {"correlation": float("nan"), "accuracy": 0.5},
    )
    trainer.train()
    metrics = json.loads((tmp_path / "search.json").read_text())["rounds"][0]["metrics"]
    assert metrics["eval_correlation"] is None
    assert metrics["eval_accuracy"] == 0.5
    assert not any("runtime" in name or "per_second" in name for name in metrics)


def test_a_full_disk_keeps_the_tickets_before(tmp_path, monkeypatch):
    original, calls = mask_file._write, []

    def fails_in_the_second_round(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(mask_file, "_write", fails_in_the_second_round)
        with pytest.raises(OSError, match="the disk is full"):
            search(tmp_path).train()
    assert Ticket.from_pretrained(tmp_path / "round-1" / "ticket").sparsity == pytest.approx(0.25, abs=1e-3)
    assert not list(tmp_path.rglob("*.partial"))
    resumed = search(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    whole = search(tmp_path / "whole")
    whole.train()
    assert_same(ticket_masks(resumed), ticket_masks(whole))


def test_there_is_no_ticket_before_the_first_round(tmp_path):
    with pytest.raises(RuntimeError, match="no round is finished"):
        _ = search(tmp_path).ticket


@pytest.mark.parametrize(
    ("fsdp", "stage", "config", "score", "match"),
    [
        (1, None, {}, "magnitude", "shards of FSDP2, got version 1. Set `fsdp_version: 2`"),
        (None, 0, {}, "magnitude", "ZeRO-1, ZeRO-2 and ZeRO-3 step, got stage 0"),
        (None, 2, {"scheduler": {"type": "WarmupLR"}}, "magnitude", "got a `scheduler` in DeepSpeed's config"),
        (None, 3, {}, "gradient", "reads gradients, which DeepSpeed does not leave behind"),
    ],
)
def test_shards_that_cannot_be_rewound(fsdp, stage, config, score, match):
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(fsdp_version=fsdp),
        deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=config),
    )
    enabled = {"is_fsdp_enabled": fsdp is not None, "is_deepspeed_enabled": stage is not None}
    with pytest.raises(ValueError, match=match):
        check_search(SimpleNamespace(accelerator=SimpleNamespace(state=state), **enabled), score)
