"""What makes an early-bird search impossible is said before it begins."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_hf.tickets.configs import LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training.callback import SparsityCallback
from sparse_hf.training.early_bird_detector import EarlyBirdDetector
from tiny_models import tiny_model
from tiny_slim import OPT_TABLE
from training.test_lottery_refusals import assert_refused
from training.tiny_early_bird import bird_trainer, early_bird, fake_latency, whole_bert
from training.tiny_training import Crash, CrashAt, assert_same, tensors, tiny_trainer


SPEEDUP = {"heads": None, "neurons": None, "target_speedup": 2.0}


def refused(folder, match, error=ValueError, model=None, **config_changes):
    assert_refused(bird_trainer(folder, early_bird(**config_changes), model), error, match)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"heads": 0.9}, "at least one unit, got 0.9, which would empty a layer: position 0 with 4 units"),
        ({"heads": 0.9, "head_scope": "global"}, "at least one block .* got 0.9, which keeps 1 and would empty"),
        ({"neurons": 0.99}, "at least one block of `multiple_of=4`, together 8 units, got 0.99"),
        ({"neurons": 0.99, "neuron_scope": "layer"}, "at least one unit, got 0.99, which would empty a layer"),
    ],
)
def test_budgets_that_empty_a_layer(tmp_path, changes, match):
    refused(tmp_path, match, **changes)


def test_a_family_without_a_table(tmp_path):
    opt = tiny_model("opt", "sequence_classification")
    refused(tmp_path, r"known for bert, roberta, .* got 'opt' .*no code is needed: `UnitTable\(layers=", model=opt)
    trainer = bird_trainer(tmp_path, early_bird(draw_at=2, unit_table=OPT_TABLE), opt, max_steps=3)
    trainer.train()  # as the sentence says
    assert trainer.ticket.counts()["decoder.layers.0.heads"] == 2
    assert "unit_table" in json.loads((tmp_path / "search.json").read_text())["config"]
    again = bird_trainer(tmp_path, early_bird(draw_at=2, unit_table=OPT_TABLE), opt, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert_same(again.ticket.units, trainer.ticket.units)


def test_a_table_that_does_not_fit(tmp_path):
    refused(tmp_path, "table of units .* fit the model", unit_table=OPT_TABLE)


def test_uniform_where_the_stock_config_cannot_say_it(tmp_path):
    refused(tmp_path, "`uniform=True` needs .*a bert config cannot say that heads are missing.*Leave", uniform=True)
    trainer = bird_trainer(tmp_path, early_bird(heads=0.0, uniform=True, draw_at=2), max_steps=3)
    trainer.train()  # neurons it can say
    assert type(trainer.model).__name__ == "BertForSequenceClassification"
    assert trainer.model.config.intermediate_size == 16


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draw_at": 7}, r"`draw_at` must lie inside the training of 6 steps \(4 per epoch\), got 7"),
        ({"draw_at": 1.75}, "inside the training of 6 steps .* got 1.75"),
        ({"history": 6}, "`history` = 6 looks, got room for 5 between step 2 .* and 6 .* at every 1 steps"),
        ({"check_every": 4}, "`history` = 2 looks, got room for 1 between"),
        ({"earliest": 1.5}, "got room for 1 between step 6"),
        ({"earliest": 60}, "got room for 0 between step 60"),
        ({"longest": 0.5}, "got room for 1 between step 2 .* and 2"),
        ({"longest": 60, "history": 6}, "got room for 5 between step 2 .* and 6"),
    ],
)
def test_a_draw_that_would_never_come(tmp_path, changes, match):
    refused(tmp_path, match, **changes)


@pytest.mark.parametrize("changes", [{"draw_at": 6}, {"history": 5}, {"earliest": 5}, {"check_every": 3}])
def test_a_draw_that_just_comes(tmp_path, changes):
    trainer = bird_trainer(tmp_path, early_bird(final_training=False, **changes))
    trainer.train()
    assert trainer.search.drawn_at <= 6


@pytest.mark.parametrize(
    ("name", "plugin", "changes", "match"),
    [
        ("is_fsdp_enabled", {"fsdp_version": 1}, {}, "shards of FSDP2, got version 1"),
        ("is_fsdp_enabled", {"fsdp_version": 2}, SPEEDUP, "`target_speedup` measures a whole model on one device"),
        ("is_deepspeed_enabled", {"zero_stage": 0}, {}, "ZeRO-1, ZeRO-2 and ZeRO-3 step, got stage 0"),
        ("is_fsdp_enabled", {"fsdp_version": 2}, {}, r"FSDP2 splits weights of one dtype only, got \['torch.bfloat16"),
    ],
)
def test_shards_that_cannot_be_searched(tmp_path, name, plugin, changes, match):
    trainer = bird_trainer(tmp_path, early_bird(**changes), whole_bert().bfloat16())
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin), deepspeed_plugin=SimpleNamespace(**plugin))
    trainer.accelerator = SimpleNamespace(state=state, mixed_precision="no")
    setattr(trainer, name, True)
    assert_refused(trainer, ValueError, match)


def test_what_only_one_training_takes(tmp_path):
    with pytest.raises(ValueError, match="takes nothing but `resume_from_checkpoint`"):
        bird_trainer(tmp_path).train(trial={"learning_rate": 1e-4})


def test_several_gpus_in_one_process(tmp_path):
    trainer = bird_trainer(tmp_path)
    trainer.args._n_gpu = 2
    assert_refused(trainer, ValueError, "one process per GPU by `accelerate launch` or `torchrun`")


def test_checkpoints_that_cut_the_search_short(tmp_path):
    assert_refused(bird_trainer(tmp_path, enable_jit_checkpoint=True), ValueError, "enable_jit_checkpoint")


def test_a_ready_made_optimizer(tmp_path):
    model = whole_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="got a ready-made one in `optimizers`"):
        bird_trainer(tmp_path, early_bird(), model, optimizers=(optimizer, None))


def test_what_is_no_transformers_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    assert_refused(bird_trainer(tmp_path, model=model), TypeError, "from a `PreTrainedModel`, got Sequential")


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["query", "value"])
    wrapped = peft.get_peft_model(whole_bert(), adapters)
    assert_refused(bird_trainer(tmp_path, model=wrapped), TypeError, "Merge adapters first")
    for target in ("query", "output.dense", "pooler.dense"):
        inside = whole_bert()
        inside.add_adapter(peft.LoraConfig(target_modules=[target]))
        match = rf"must have the parameters of its class, but `\S*{target}.weight` is wrapped.*Merge adapters"
        assert_refused(bird_trainer(tmp_path, model=inside), ValueError, match)


def test_parametrised_weights(tmp_path):
    model = whole_bert()
    torch.nn.utils.parametrizations.weight_norm(model.bert.pooler.dense)
    assert_refused(bird_trainer(tmp_path, model=model), ValueError, "but `bert.pooler.dense.weight` is wrapped")


def test_a_folder_with_an_early_bird_run_is_not_overwritten(tmp_path):
    bird_trainer(tmp_path).train()
    assert_refused(bird_trainer(tmp_path), FileExistsError, "already holds a search")


def test_a_folder_with_another_run(tmp_path):
    tiny_trainer(tmp_path / "a", StaticSparsityConfig(sparsity=0.5), save_strategy="steps", save_steps=6).train()
    for resume in (False, True):
        trainer = bird_trainer(tmp_path / "a")
        match = r"holds another run \(checkpoint-6\)"
        assert_refused(trainer, FileExistsError, match, resume_from_checkpoint=resume)
    tiny_trainer(tmp_path / "b", LotteryTicketConfig(sparsity=0.5, rounds=1), max_steps=2).train()
    match = "was started with method='lottery_ticket', got 'early_bird'"
    assert_refused(bird_trainer(tmp_path / "b"), ValueError, match, resume_from_checkpoint=True)


def test_a_folder_that_lost_its_journal(tmp_path):
    """The checkpoints of its search would be taken for the new one's."""
    options = {"save_strategy": "steps", "save_steps": 1}
    bird_trainer(tmp_path, early_bird(final_training=False), **options).train()
    (tmp_path / "search.json").unlink()
    match = r"holds another run \(search.checkpoint-1\)"
    for resume in (False, True):
        trainer = bird_trainer(tmp_path)
        assert_refused(trainer, FileExistsError, match, resume_from_checkpoint=resume)


def test_another_config_or_model_on_resuming(tmp_path):
    bird_trainer(tmp_path).train()
    other = bird_trainer(tmp_path, early_bird(heads=0.25))
    assert_refused(other, ValueError, "started with heads=0.5, got 0.25", resume_from_checkpoint=True)
    wider = bird_trainer(tmp_path, model=whole_bert(intermediate_size=48))
    assert_refused(wider, ValueError, "saved from another model", resume_from_checkpoint=True)


def test_a_path_is_no_way_to_resume(tmp_path):
    for path in (tmp_path / "search" / "checkpoint-2", str(tmp_path / "checkpoint-2")):
        trainer = bird_trainer(tmp_path)
        match = "resumed by `resume_from_checkpoint=True`"
        assert_refused(trainer, ValueError, match, resume_from_checkpoint=path)


@pytest.mark.parametrize("ended", [True, False], ids=["finished", "after an error"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_trainer_whose_model_is_cut_is_not_searched_again(tmp_path, ended, resume):
    trainer = bird_trainer(tmp_path, callbacks=[] if ended else [CrashAt(2, 2)])
    if ended:
        trainer.train()
    else:
        with pytest.raises(Crash):
            trainer.train()
    match = r"begins with a whole model, .* is cut already \(SlimBert\w*\)\. Make a new trainer with the whole model"
    assert_refused(trainer, ValueError, match, resume_from_checkpoint=resume)


def test_a_speedup_that_cannot_be_reached_is_said_at_the_first_look(tmp_path, monkeypatch):
    fake_latency(monkeypatch)
    trainer = bird_trainer(tmp_path, early_bird(heads=None, neurons=None, target_speedup=20.0))
    with pytest.raises(ValueError, match=r"`target_speedup=20.0` cannot be reached: .*4.333 times as fast"):
        trainer.train()


def test_a_callback_cannot_search():
    with pytest.raises(TypeError, match=r"A search by `EarlyBirdConfig` trains more than once.*SparseTrainer"):
        SparsityCallback(early_bird())


def test_a_structured_ticket_makes_a_model_that_others_do_not_know(tmp_path):
    ticket = StructuredTicket.from_model(whole_bert(), early_bird())
    match = r"unknown to `model_init` and a ready-made optimizer. Pass `model=slim\(model, ticket\)`"
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, ticket, model_init=lambda: whole_bert())
    model = whole_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, ticket, model, optimizers=(optimizer, None))
    before = tensors(other := whole_bert(num_hidden_layers=3))
    with pytest.raises(ValueError, match="masks of another model: it lacks `encoder.layer.2.heads`"):
        tiny_trainer(tmp_path, ticket, other)
    assert_same(tensors(other), before)


def test_there_is_no_ticket_before_the_draw(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        _ = bird_trainer(tmp_path).ticket


def test_a_damaged_list_of_looks(tmp_path):
    detector = EarlyBirdDetector(SimpleNamespace(), early_bird(), 4)
    with pytest.raises(FileNotFoundError, match="mask_history.json"):
        detector.restore(tmp_path)
    (tmp_path / "mask_history.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        detector.restore(tmp_path)
