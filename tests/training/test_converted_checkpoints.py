"""Checkpoints in another layout than the model's: experts stored one by one, or parameters under other names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer

from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.training.converted_checkpoints import load_converted, needs_conversion
from sparse_hf.training.trainer import SparseTrainer
from tiny_models import tiny_model
from training.tiny_balance import rows
from training.tiny_training import Crash, CrashAt, assert_same, same, tensors, tiny_arguments


STORED_OTHERWISE = {
    "mixtral": ("mixtral", "causal_lm"),
    "qwen3-moe": ("qwen3-moe", "causal_lm"),
    "vit": ("vit", "image_classification"),
}


def mixture(seed: int = 0, **changes: object) -> PreTrainedModel:
    return tiny_model("mixtral", "causal_lm", seed=seed, **changes)


def images() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": row % 3} for row in range(8)]


def trainer_of(folder: Path, model: PreTrainedModel, stock: bool = False, **changes: object) -> Trainer:
    """Four steps, a checkpoint every two of them."""
    is_mixture = model.config.model_type != "vit"
    data = rows() if is_mixture else images()
    callbacks = changes.pop("callbacks", None)
    arguments = tiny_arguments(folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes})
    own = {} if stock or not is_mixture else {"balance": BalanceConfig()}
    made_by = Trainer if stock else SparseTrainer
    return made_by(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks, **own)


def cut_into_shards(checkpoint: Path, model: PreTrainedModel) -> None:
    """Let the checkpoint hold its weights in several files."""
    model = type(model).from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_a_resumed_training_is_the_one_that_did_not_stop(tmp_path, name, sharded):
    family, head = STORED_OTHERWISE[name]
    whole = trainer_of(tmp_path / "whole", tiny_model(family, head))
    whole.train()
    with pytest.raises(Crash):
        trainer_of(tmp_path / "cut", tiny_model(family, head), callbacks=[CrashAt(3)]).train()
    fresh = tiny_model(family, head, seed=9)
    if sharded:
        cut_into_shards(tmp_path / "cut" / "checkpoint-2", fresh)
    assert needs_conversion(fresh, tmp_path / "cut" / "checkpoint-2")
    resumed = trainer_of(tmp_path / "cut", fresh)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(tensors(whole.model), tensors(resumed.model))


def test_the_best_model_is_the_one_that_was_evaluated_best(tmp_path):
    trainer = trainer_of(
        tmp_path,
        mixture(),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first of the two, for the loss falls
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    assert_same(tensors(trainer.model), tensors(best))
    assert not same(tensors(trainer.model), tensors(last))


def test_a_stock_trainer_goes_on_with_fresh_experts(tmp_path):
    """Once this fails, Transformers has mended it, and `converted_checkpoints` can go."""
    trainer_of(tmp_path, mixture(), max_steps=2).train()
    stored = tensors(mixture().from_pretrained(tmp_path / "checkpoint-2"))
    fresh = mixture(seed=9)
    before = tensors(fresh)
    trainer_of(tmp_path, fresh, stock=True)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    kept = [name for name, tensor in fresh.state_dict().items() if torch.equal(tensor, before[name])]
    assert any(".experts." in name for name in kept)
    trainer_of(tmp_path, fresh)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert_same(tensors(fresh), stored)


def test_each_tensor_keeps_its_dtype_and_every_bit(tmp_path):
    model = mixture().to(torch.bfloat16)
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.to(torch.float32)
    with torch.no_grad():
        router.weight.add_(1e-4)  # no bfloat16 numbers
    model.save_pretrained(tmp_path)
    other = mixture(seed=9).to(torch.bfloat16)
    other.get_submodule("model.layers.0.mlp.gate").to(torch.float32)
    load_converted(other, tmp_path)
    assert_same(tensors(other), tensors(model))
    assert {name: one.dtype for name, one in other.state_dict().items()} == {
        name: one.dtype for name, one in model.state_dict().items()
    }


def test_loading_draws_no_random_number(tmp_path):
    mixture().save_pretrained(tmp_path)
    model = mixture(seed=9)
    before = torch.random.get_rng_state()
    load_converted(model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "says"), [("drop", "is missing"), ("add", "is unknown"), ("narrow", "another shape")]
)
def test_a_checkpoint_that_does_not_fill_the_model_changes_nothing(tmp_path, change, says):
    mixture().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        del stored["model.norm.weight"]
    elif change == "add":
        stored["model.extra.weight"] = torch.zeros(2)
    else:
        stored["model.norm.weight"] = torch.zeros(3)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = mixture(seed=9)
    before = tensors(model)
    with pytest.raises(ValueError, match=says):
        load_converted(model, tmp_path)
    assert_same(tensors(model), before)


def test_a_missing_shard_is_named(tmp_path):
    mixture().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 9 are missing"):
        needs_conversion(mixture(), tmp_path)


def test_what_the_trainer_reads_itself_is_left_to_it(tmp_path):
    model = tiny_model("bert", "sequence_classification")
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "adapter").mkdir()
    assert not needs_conversion(model, tmp_path / "bert")
    assert not needs_conversion(model, tmp_path / "adapter")
    assert not needs_conversion(torch.nn.Linear(2, 2), tmp_path / "bert")
    tied = tiny_model("mixtral", "causal_lm", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    load_converted(tied, tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
