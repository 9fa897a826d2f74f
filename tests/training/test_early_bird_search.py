"""Search, draw, train: what an early-bird run leaves behind, and from where its smaller model begins."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, LlamaForSequenceClassification

from sparse_hf.tickets.draw_units import draw_units
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training.step_timer import StepTimer
from tiny_models import tiny_model
from training.tiny_early_bird import (
    KEYS,
    LATENCY,
    Recorder,
    bird_trainer,
    early_bird,
    equal_logits,
    fake_latency,
    sliced,
    whole_bert,
)
from training.tiny_training import AtStep, assert_same, same, tensors, tiny_rows


CONFIG = early_bird(threshold=0.99)  # settles at the second look that counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run with its model, its trainer, what was recorded, and what `train` returned."""
    folder, model, recorder = tmp_path_factory.mktemp("whole"), whole_bert(), Recorder()
    last = {}
    watch = AtStep(lambda step, model, **_: last.setdefault((type(model).__name__, step), tensors(model)))
    options = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    trainer = bird_trainer(folder, CONFIG, model, callbacks=[recorder, watch], **options)
    output = trainer.train()
    return folder, model, trainer, recorder, output, last


def test_the_model_has_the_heads_and_neurons_of_the_ticket(whole):
    _, model, trainer, *_ = whole
    counts = trainer.ticket.counts()
    assert list(counts) == KEYS
    assert [counts[key] for key in KEYS[::2]] == [2, 2]
    assert sum(counts[key] for key in KEYS[1::2]) == 32
    assert all(count % 4 == 0 for count in counts.values() if count > 2)
    # All layers keep as many heads, but a BERT config cannot say so.
    assert type(trainer.model).__name__ == "SlimBertForSequenceClassification"
    assert trainer.model.config.slim["kept"] == counts
    shapes = {name: tensor.shape for name, tensor in tensors(trainer.model).items()}
    assert shapes == {name: tensor.shape for name, tensor in sliced(tensors(model), trainer.ticket.units).items()}


def test_the_smaller_model_begins_at_slices_of_the_start(whole):
    _, _, trainer, recorder, _, last = whole
    start = tensors(whole_bert())
    (searching, first), (training, second) = recorder.begins
    assert [one.__name__ for one in (searching, training)] == [
        "BertForSequenceClassification",
        "SlimBertForSequenceClassification",
    ]
    assert_same({name: first[name] for name in start}, start)
    added = [value for name, value in first.items() if name not in start]
    assert [value.tolist() for value in added] == [[1.0] * width for width in (4, 32, 4, 32)]
    assert_same(second, sliced(start, trainer.ticket.units))
    searched = last["BertForSequenceClassification", trainer.search.drawn_at]
    assert not same({name: searched[name] for name in start}, start)
    assert not torch.equal(searched["classifier.weight"], start["classifier.weight"])
    assert not same(tensors(trainer.model), second)


def test_the_model_passed_stays_whole(whole):
    _, model, trainer, *_ = whole
    assert trainer.model is not model
    assert_same(tensors(model), tensors(whole_bert()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert equal_logits(model, whole_bert())


def test_what_lies_in_the_folder(whole):
    folder, _, trainer, *_ = whole
    names = {entry.name for entry in folder.iterdir()}
    files = {"search.json", "start.safetensors", "search", "coefficients.safetensors", "ticket"}
    assert names == files | {"checkpoint-3", "checkpoint-6"}
    assert_same(load_file(folder / "start.safetensors"), tensors(whole_bert()))
    content = json.loads((folder / "search.json").read_text())
    assert content["finished"]
    assert content["config"]["method"] == "early_bird"
    (drawn,) = content["rounds"]
    search = trainer.search
    assert (drawn["drawn_at"], drawn["steps"], drawn["distances"]) == (3, search.steps, search.distances)
    assert drawn["settled"] is True
    assert search.drawn_at == 3
    assert search.steps == [1, 2, 3]
    ticket = StructuredTicket.from_pretrained(folder / "ticket")
    assert_same(ticket.units, trainer.ticket.units)
    assert ticket.origin.method == "early_bird"
    assert ticket.origin.metrics == {"drawn_at": 3, "settled": True}


def test_the_ticket_is_drawn_from_the_coefficients_of_the_draw(whole):
    folder, _, trainer, _, _, last = whole
    coefficients = load_file(folder / "coefficients.safetensors")
    assert sorted(coefficients) == sorted(KEYS)
    searched = last["BertForSequenceClassification", 3]
    for number, key in enumerate(KEYS):
        assert torch.equal(coefficients[key], searched[f"sparse_hf_coefficients.values.{number}"])
    assert_same(draw_units({key: coefficients[key] for key in KEYS}, CONFIG), trainer.ticket.units)


def test_what_is_saved_loads_again(whole, tmp_path):
    folder, _, trainer, *_ = whole
    trainer.save_model(tmp_path / "model")
    for path in (tmp_path / "model", folder / "checkpoint-6"):
        loaded = AutoModelForSequenceClassification.from_pretrained(path)
        assert type(loaded) is type(trainer.model)
        assert equal_logits(loaded, trainer.model)
        description = json.loads((path / "sparse_hf.json").read_text())
        assert description["kind"] == "slim_model"
        assert description["units"]["kept_heads"] == 4


def test_logs_say_the_stage_and_the_mask_distance(whole):
    _, _, trainer, recorder, *_ = whole
    logs = [record for record in recorder.logs if "loss" in record]
    assert [record["stage"] for record in logs] == [1] * 3 + [3] * 6
    assert ["mask_distance" in record for record in logs] == [False, False, True] + [False] * 6
    assert logs[2]["mask_distance"] == trainer.search.distances[2][1]
    recorder.logs.clear()
    trainer.evaluate(tiny_rows(4))
    assert "eval_loss" in recorder.logs[0]
    assert "stage" not in recorder.logs[0]


def test_the_report_counts_the_whole_time(whole, tmp_path, monkeypatch):
    output = whole[4]
    assert output.global_step == 6
    assert output.metrics["early_bird_drawn_at"] == 3

    def a_second_each(self, args, state, control, **_):
        self.steps += 1
        self.seconds += 1.0 if type(_["model"]).__name__.startswith("Slim") else 2.5

    monkeypatch.setattr(StepTimer, "on_step_end", a_second_each)
    metrics = bird_trainer(tmp_path, early_bird(draw_at=2)).train().metrics
    seconds = {name: metrics[f"early_bird_{name}_seconds"] for name in ("latency", "search", "draw", "training")}
    assert seconds["latency"] == 0
    assert min(seconds["search"], seconds["draw"], seconds["training"]) > 0
    assert metrics["early_bird_step_ratio"] == 0.4
    dense = seconds["training"] + 6 * 1.5  # each of 6 steps would have lasted 1.5 s longer
    assert metrics["early_bird_saved_fraction"] == pytest.approx(1 - sum(seconds.values()) / dense)


def test_folded_coefficients_are_the_only_difference(tmp_path):
    models, starts = {}, tensors(whole_bert())
    for kind in ("discard", "fold"):
        model = whole_bert()
        config = early_bird(draw_at=3, coefficients=kind, final_training=False)
        trainer = bird_trainer(tmp_path / kind, config, model)
        output = trainer.train()
        assert output.global_step == 3
        assert_same(tensors(model), starts)
        models[kind] = tensors(trainer.model)
        assert not list((tmp_path / kind).glob("checkpoint-*"))
    units = trainer.ticket.units
    assert_same(models["discard"], sliced(starts, units))
    coefficients = load_file(tmp_path / "fold" / "coefficients.safetensors")
    expected = dict(models["discard"])
    for layer in (0, 1):
        for path, kind, width in (("attention.output.dense", "heads", 4), ("output.dense", "neurons", 1)):
            key, name = f"encoder.layer.{layer}.{kind}", f"bert.encoder.layer.{layer}.{path}.weight"
            expected[name] = expected[name] * coefficients[key][units[key]].repeat_interleave(width)
    assert_same(models["fold"], expected)
    assert not same(models["fold"], models["discard"])


def test_a_target_speedup_keeps_what_the_latency_table_allows(tmp_path, monkeypatch):
    asked = fake_latency(monkeypatch)
    config = early_bird(heads=None, neurons=None, target_speedup=2.0, draw_at=3, latency_batch=2, latency_length=7)
    trainer = bird_trainer(tmp_path, config)
    trainer.train()
    assert asked == [{"what": "training", "batch": 2, "length": 7, "multiple_of": 4, "table": None}]
    assert json.loads((tmp_path / "latency.json").read_text()) == LATENCY.to_dict()
    assert 12 <= LATENCY.predicted(trainer.ticket.counts()) <= 13  # nothing costs more than 1 s: less is left over
    shapes = {name: tensor.shape for name, tensor in sliced(tensors(whole_bert()), trainer.ticket.units).items()}
    assert {name: tensor.shape for name, tensor in tensors(trainer.model).items()} == shapes
    bird_trainer(tmp_path, config).train(resume_from_checkpoint=True)
    assert len(asked) == 1


def test_uniform_makes_a_stock_llama(tmp_path):
    llama = tiny_model("llama", "sequence_classification")
    trainer = bird_trainer(tmp_path / "run", early_bird(draw_at=3, uniform=True), llama, max_steps=4)
    trainer.train()
    assert type(trainer.model) is LlamaForSequenceClassification
    config = trainer.model.config
    # A unit of heads is a key/value head with its two query heads.
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (1, 2, 8)
    assert config.intermediate_size == 32
    trainer.save_model(tmp_path / "model")
    assert equal_logits(LlamaForSequenceClassification.from_pretrained(tmp_path / "model"), trainer.model)


def test_evaluation_and_early_stopping_are_of_the_smaller_model(tmp_path):
    recorder, stop = Recorder(), EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=9.0)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_on_start": True}
    config = early_bird(draw_at=5)
    trainer = bird_trainer(
        tmp_path, config, eval_dataset=tiny_rows(4), callbacks=[recorder, stop], max_steps=8, **options
    )
    output = trainer.train()
    assert trainer.search.drawn_at == 5  # nothing had stopped the search
    evaluated = [record for record in recorder.logs if "eval_loss" in record]
    assert {record["stage"] for record in evaluated} == {3}
    assert output.global_step == 4  # no loss falls by 9
    best = trainer.state.best_model_checkpoint
    losses = [record["eval_loss"] for record in evaluated]
    assert len(losses) == 3  # at the start, and after two and four steps
    assert best == str(tmp_path / ("checkpoint-2" if losses[1] < losses[2] else "checkpoint-4"))
    assert equal_logits(AutoModelForSequenceClassification.from_pretrained(best), trainer.model)
    assert stop in trainer.callback_handler.callbacks


def test_a_structured_ticket_is_trained_slim(tmp_path, whole):
    _, _, found, *_ = whole
    model = whole_bert()
    trainer = bird_trainer(tmp_path, found.ticket, model)
    assert type(trainer.model) is type(found.model)
    assert_same(tensors(trainer.model), sliced(tensors(model), found.ticket.units))
    assert trainer.ticket is found.ticket
    trainer.train()
    assert_same(tensors(trainer.model), tensors(found.model))  # as the third stage trained it
    assert_same(tensors(model), tensors(whole_bert()))
