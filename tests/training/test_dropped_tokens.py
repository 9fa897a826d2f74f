"""What full experts lose is in the log: the mean over all passes of training since the last record."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from sparse_hf import RouterConfig, SparseTrainer
from tiny_mixtures import convert, tiny_dense
from training.tiny_training import tiny_arguments


def rows(count=8):
    ids = torch.randint(3, 60, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one % 2} for one in ids]


def mixture(folder, variant, router, loader):
    tiny_dense(variant).save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "moe", router=router, top_k=1)
    return loader.from_pretrained(folder / "moe")


@pytest.mark.parametrize(
    ("variant", "router", "loader"),
    [
        ("gpt2", RouterConfig(capacity_factor=0.5), AutoModelForCausalLM),
        ("bert", RouterConfig("expert_choice", capacity_factor=0.5), AutoModelForTokenClassification),
    ],
)
def test_every_pass_of_training_counts_and_no_other(tmp_path, variant, router, loader):
    model = mixture(tmp_path, variant, router, loader)
    seen = []
    blocks = [module for module in model.modules() if type(module).__name__ == "MixtureBlock"]
    for block in blocks:
        block.register_forward_hook(lambda module, *_: seen.append((module.training, float(module.dropped_fraction))))
    arguments = tiny_arguments(
        tmp_path / "out", max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_strategy="steps", logging_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    trainer = SparseTrainer(model, arguments, train_dataset=rows(), eval_dataset=rows(2))
    trainer.train()
    passes = torch.tensor([fraction for training, fraction in seen if training]).view(8, len(blocks))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry, part in zip(logs, passes.split(4), strict=True):
        layers = part.mean(0)
        assert entry["dropped_fraction"] == pytest.approx(float(layers.mean()))
        assert entry["dropped_fraction_worst_layer"] == pytest.approx(float(layers.max()))
        assert 0 < entry["dropped_fraction"] < 1


def test_routers_that_lose_nothing_log_nothing(tmp_path):
    model = mixture(tmp_path, "gpt2", RouterConfig(), AutoModelForCausalLM)
    trainer = SparseTrainer(model, tiny_arguments(tmp_path / "out", max_steps=1), train_dataset=rows())
    trainer.train()
    assert not any("dropped_fraction" in entry for entry in trainer.state.log_history)
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__ == "MixtureBlock")
