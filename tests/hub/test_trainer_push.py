"""A trainer's pushes carry masks and a card, at the end and along the way."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from dsee.tiny_dsee import base_model, dsee_model, logits
from hub.hub_server import hub as hub  # a fixture
from sparse_hf import GradualPruningConfig, LotteryTicketConfig, StaticSparsityConfig, StructuredTicket, Ticket
from sparse_hf.cards import card
from training.tiny_training import assert_same, tensors, tiny_classifier, tiny_rows, tiny_trainer


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Drawing takes most of the time of a push, and these tests are not about it."""
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)
    monkeypatch.setattr("sparse_hf.training.trainer_card.draw_layers", lambda *_: None)


def trained(folder, sparsity, **options):
    options = {"hub_model_id": "me/model", **options}
    trainer = tiny_trainer(folder, sparsity, eval_dataset=tiny_rows(8, seed=1), **options)
    trainer.train()
    return trainer


def test_push_to_hub_publishes_the_sparse_model(hub, tmp_path):
    trainer = trained(tmp_path / "run", StaticSparsityConfig(sparsity=0.5), max_steps=2)
    measured = trainer.evaluate()["eval_loss"]
    trainer.push_to_hub()
    pulled = AutoModelForSequenceClassification.from_pretrained("me/model")
    assert_same(tensors(pulled), tensors(trainer.model))
    ticket = Ticket.from_pretrained("me/model")
    assert_same(ticket.masks(), trainer.ticket.masks())
    text = hub.text("me/model", "README.md")
    assert "A sparse model" in text
    assert f"| loss | {measured:.4g} |" in text
    assert "sparsity=0.5," in text
    assert "learning_rate: 0.01" in text  # what the Trainer's own card tells
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("sparse_hf", "text-classification")
    assert {"sparse_hf", "static-sparsity", "generated_from_trainer"} <= set(data.tags)
    assert data.eval_results[0].metric_value == pytest.approx(measured)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_every_push_of_a_training_has_the_masks_of_its_weights(hub, tmp_path, strategy):
    trainer = trained(
        tmp_path / "run",
        GradualPruningConfig(sparsity=0.8, every=1, end_step=4),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    trainer._finish_current_push()
    repository = hub.repositories.named["me/model"]
    kept = []
    for commit, files in repository.commits.items():
        if "model.safetensors" in files:
            assert {"sparse_masks.safetensors", "sparse_hf.json", "README.md"} <= files.keys()
            kept.append(_kept_where_the_masks_say(commit, tmp_path / commit))
        # `last-checkpoint/` is what a training on another machine resumes from
        if "last-checkpoint/model.safetensors" in files:
            assert "last-checkpoint/sparse_masks.safetensors" in files
    if strategy != "end":
        assert len(kept) >= 2
        assert kept[0] > kept[-1]  # the masks of the first push were those of its time
    else:
        assert kept == []  # the Trainer pushes at the end of a training only by `push_to_hub`
        trainer.push_to_hub()
        assert "sparse_masks.safetensors" in hub.files("me/model")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_along_the_way_over_compressed_weights(hub, tmp_path, strategy):
    trained(tmp_path / "first", StaticSparsityConfig(sparsity=0.5), max_steps=1).push_to_hub(compressed=True)
    assert "compressed.safetensors" in hub.files("me/model")
    options = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_strategy": strategy}
    trainer = trained(tmp_path / "run", StaticSparsityConfig(sparsity=0.5), max_steps=4, seed=1, **options)
    trainer._finish_current_push()
    assert all(job.exception() is None for job in trainer.push_in_progress.jobs)
    names = set(hub.files("me/model"))
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith("compressed")]
    # Between the Trainer's commit and the one that deletes, the new weights are read.
    repository = hub.repositories.named["me/model"]
    both = [
        oid
        for oid, files in repository.commits.items()
        if {"compressed.safetensors", "model.safetensors"} <= files.keys()
    ]
    assert both
    _kept_where_the_masks_say(both[0], tmp_path / "cache-both")
    assert repository.messages.count("Delete the weights that the last push replaced") == 1
    _kept_where_the_masks_say(repository.refs["main"], tmp_path / "cache-main")


def test_a_push_along_the_way_that_fails_deletes_nothing(hub, tmp_path):
    trained(tmp_path / "first", StaticSparsityConfig(sparsity=0.5), max_steps=1).push_to_hub(compressed=True)
    before = dict(hub.files("me/model"))
    hub.fail("POST /api/models/me/model/commit/", 403, times=9)
    options = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "every_save"}
    trainer = trained(tmp_path / "run", StaticSparsityConfig(sparsity=0.5), max_steps=1, **options)
    trainer._finish_current_push()
    assert trainer.push_in_progress.jobs[-1].exception() is not None
    assert hub.files("me/model") == before


def _kept_where_the_masks_say(commit, cache):
    """Weights kept by the masks of a commit, after a look that no other weight is there."""
    ticket = Ticket.from_pretrained("me/model", revision=commit, cache_dir=cache)
    model = AutoModelForSequenceClassification.from_pretrained("me/model", revision=commit, cache_dir=cache)
    for name, mask in ticket.masks().items():
        assert not (model.get_parameter(f"bert.{name}").detach()[~mask] != 0).any(), name
    return ticket.num_kept


def test_a_search_keeps_its_working_files(hub, tmp_path):
    config = LotteryTicketConfig(sparsity=0.5, rounds=2, rewind_step=1, round_steps=2)
    trainer = trained(tmp_path / "run", config, max_steps=2)
    trainer.push_to_hub()
    names = set(hub.files("me/model"))
    assert {"model.safetensors", "sparse_masks.safetensors", "README.md", "search.json"} <= names
    assert (tmp_path / "run" / "start.safetensors").is_file()
    assert not [name for name in names if name.startswith(("round-", "start.", "rewind.", "checkpoint-"))]
    assert "LotteryTicketConfig(\n" in hub.text("me/model", "README.md")


def test_a_slim_model_is_pushed_with_the_code_that_reads_it(hub, tmp_path):
    units = {"encoder.layer.0.heads": torch.tensor([True, False]), "encoder.layer.1.heads": torch.ones(2) > 0}
    units |= {f"encoder.layer.{layer}.neurons": torch.arange(32) < 8 * (layer + 1) for layer in range(2)}
    trainer = trained(tmp_path / "run", StructuredTicket(units), model=tiny_classifier(), max_steps=1)
    trainer.push_to_hub()
    pulled = AutoModelForSequenceClassification.from_pretrained("me/model")
    assert_same(tensors(pulled), tensors(trainer.model))
    assert "| `encoder.layer.1` | 2 of 2 | 16 of 32 |" in hub.text("me/model", "README.md")


@pytest.mark.parametrize("blocking", [True, False])
def test_push_to_hub_compressed_and_dense_again(hub, tmp_path, blocking):
    trainer = trained(tmp_path / "run", StaticSparsityConfig(sparsity=0.5), max_steps=1)

    def push(**options):
        pushed = trainer.push_to_hub("message", blocking=blocking, **options)
        assert (pushed if blocking else pushed.result()).oid == hub.repositories.named["me/model"].refs["main"]
        commits.append(set(hub.files("me/model")))
        assert_same(tensors(AutoModelForSequenceClassification.from_pretrained("me/model")), tensors(trainer.model))
        assert_same(Ticket.from_pretrained("me/model").masks(), trainer.ticket.masks())
        return hub.text("me/model", "README.md")

    commits = []
    push()
    text = push(compressed=True, tags="mine")
    assert "import sparse_hf\nfrom transformers" in text
    assert "learning_rate: 0.01" in text
    assert {"compressed", "mine", "generated_from_trainer"} <= set(ModelCard(text).data.tags)
    assert (tmp_path / "run" / "model.safetensors").is_file()  # here it stays dense, and its card says so
    assert "import sparse_hf\nfrom" not in (tmp_path / "run" / "README.md").read_text()
    assert "import sparse_hf\nfrom" not in push()
    assert commits[0] - commits[1] == {"model.safetensors"}
    assert commits[1] - commits[0] == {"compressed.safetensors"}
    assert commits[2] == commits[0]
    assert hub.repositories.named["me/model"].messages[-3:] == ["message"] * 3


def test_a_dsee_adapter(hub, tmp_path):
    adapted = dsee_model("bert", stirred=False)
    trainer = trained(tmp_path / "run", None, model=adapted, max_steps=1)
    trainer.push_to_hub()
    pulled = PeftModel.from_pretrained(base_model("bert"), "me/model").eval()
    assert torch.equal(logits(pulled), logits(adapted.eval()))
    with pytest.raises(FileNotFoundError, match="adapters are not compressed"):
        trainer.push_to_hub(compressed=True)
    text = hub.text("me/model", "README.md")
    assert "A DSEE adapter" in text
    assert ModelCard(text).data.library_name == "sparse_hf"


def test_a_card_without_a_push_and_a_model_that_is_not_sparse(hub, tmp_path):
    trainer = trained(tmp_path / "sparse", StaticSparsityConfig(sparsity=0.5), max_steps=1)
    trainer.create_model_card()
    assert "50.00% (" in (tmp_path / "sparse" / "README.md").read_text()
    dense = trained(tmp_path / "dense", None, max_steps=1)
    dense.create_model_card()
    assert "library_name: transformers" in (tmp_path / "dense" / "README.md").read_text()
