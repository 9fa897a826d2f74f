"""What a search does with what is around it: logs, metrics, `model_init`, iterable data, the trainer's arguments."""

import json

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.ticket import Ticket
from training.tiny_training import assert_same, tensors, ticket_masks, tiny_classifier, tiny_rows, tiny_trainer


CONFIG = LotteryTicketConfig(sparsity=0.5, rounds=2)


class Recorder(TrainerCallback):
    """Stands for TensorBoard or W&B."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def test_logs_carry_the_round_and_the_sparsity(tmp_path):
    recorder = Recorder()
    options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny_rows(4)}
    tiny_trainer(tmp_path, CONFIG, callbacks=[recorder], **options).train()
    assert any("eval_loss" in logs for logs in recorder.logs)
    found = [(logs.get("round"), round(logs["sparsity"], 3)) for logs in recorder.logs if "loss" in logs]
    assert found == [(1, 0.0)] * 2 + [(2, 0.25)] * 2 + [(None, 0.5)] * 2
    assert all("sparsity" in logs for logs in recorder.logs)


def test_metrics_are_those_of_the_pruned_weights(tmp_path):
    """With the best weights loaded, those of the best evaluation; of every evaluation set."""
    values = iter([0.5, 0.5, 0.9, 0.9, 0.7, 0.7] * 3)
    trainer = tiny_trainer(
        tmp_path,
        CONFIG,
        max_steps=3,
        eval_dataset={"a": tiny_rows(4), "b": tiny_rows(4, seed=1)},
        compute_metrics=lambda _: {"accuracy": next(values)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="a_accuracy",
    )
    trainer.train()
    content = json.loads((tmp_path / "search.json").read_text())
    assert [entry["sparsity"] for entry in content["rounds"]] == pytest.approx([0.25, 0.5])
    for metrics in (*(entry["metrics"] for entry in content["rounds"]), trainer.ticket.origin.metrics):
        assert metrics.keys() == {"eval_a_loss", "eval_a_accuracy", "eval_b_loss", "eval_b_accuracy"}
        assert metrics["eval_a_accuracy"] == 0.9
    assert Ticket.from_pretrained(tmp_path / "ticket").origin.metrics["eval_a_accuracy"] == 0.9


def test_the_output_says_where_the_time_went(tmp_path):
    trainer = tiny_trainer(tmp_path, CONFIG, max_steps=2)
    metrics = trainer.train().metrics
    for phase in ("training", "pruning", "rewinding", "saving"):
        assert metrics[f"search_{phase}_seconds"] > 0
        assert all(entry["seconds"][phase] > 0 for entry in trainer.search.records)


def test_arguments_and_callbacks_are_as_before(tmp_path):
    trainer = tiny_trainer(
        tmp_path, LotteryTicketConfig(sparsity=0.5, rounds=2, rewind_step=1, round_steps=2), max_steps=3
    )
    arguments, content = trainer.args, trainer.args.to_dict()
    callbacks = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    trainer.train()
    assert trainer.args is arguments
    assert trainer.args.to_dict() == content
    after = [
        type(one).__name__ for one in trainer.callback_handler.callbacks if type(one).__name__ != "SparsityCallback"
    ]
    assert after == callbacks
    assert trainer.search.round == 0


def test_model_init_makes_the_first_model_only(tmp_path):
    made = []

    def model_init():
        made.append(1)
        return tiny_classifier()

    trainer = tiny_trainer(tmp_path / "init", CONFIG, model_init=model_init, max_steps=3)
    trainer.train()
    assert len(made) == 1
    assert trainer.model_init is model_init
    given = tiny_trainer(tmp_path / "given", CONFIG, max_steps=3)
    given.train()
    assert_same(ticket_masks(trainer), ticket_masks(given))
    assert_same(tensors(trainer.model), tensors(given.model))


class Stream(IterableDataset):
    def __iter__(self):
        yield from tiny_rows(32)


@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_iterable_data(tmp_path, score):
    config = LotteryTicketConfig(sparsity=0.5, rounds=2, score=score, score_batches=2)
    trainer = tiny_trainer(tmp_path, config, train_dataset=Stream(), max_steps=3)
    trainer.train()
    assert trainer.ticket.sparsity == 0.5
    assert trainer.state.global_step == 3


def test_a_model_without_a_head(tmp_path):
    """Nothing is left trained between rounds then, and `head.safetensors` is empty."""

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.first = torch.nn.Linear(4, 6)
            self.second = torch.nn.Linear(6, 1)
            for parameter in self.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)

        def forward(self, x, labels):
            return {"loss": (self.second(self.first(x).tanh()).squeeze(-1) - labels).square().mean()}

    rows = [{"x": torch.full((4,), float(i)), "labels": float(i)} for i in range(8)]
    trainer = tiny_trainer(tmp_path, CONFIG, model=Loss(), train_dataset=rows, max_steps=2)
    trainer.train()
    assert trainer.ticket.num_weights == 30
    assert trainer.ticket.num_kept == 15


def test_a_second_search_in_another_folder_starts_dense(tmp_path):
    trainer = tiny_trainer(tmp_path / "a", CONFIG, max_steps=2)
    trainer.train()
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.args.output_dir = str(tmp_path / "b")
    trainer.train()
    assert recorder.logs[0]["sparsity"] == 0.0
    assert recorder.logs[0]["round"] == 1
