"""The callback in TRL's trainer, which builds on the Trainer."""

import pytest
import torch

from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.training.callback import SparsityCallback
from tiny_models import tiny_model
from training.tiny_training import AtStep, assert_zeros, tensors, tiny_rows


pytestmark = pytest.mark.trl


@pytest.mark.parametrize(
    "config", [StaticSparsityConfig(sparsity=0.5), GradualPruningConfig(sparsity=0.5, end_step=3, every=1)]
)
def test_sft_keeps_the_zeros(tmp_path, config):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": row["input_ids"].tolist()} for row in tiny_rows()]
    tokenizer = word_tokenizer()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    callback = SparsityCallback(config)
    model = tiny_model("llama", "causal_lm")
    watch = AtStep(lambda model, optimizer, **_: assert_zeros(model, callback.keeper.masks(), optimizer.optimizer))
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback, watch],
    )
    before = tensors(model)
    trainer.train()
    assert watch.calls == 4
    assert callback.ticket.sparsity == pytest.approx(0.5, abs=1e-4)
    assert_zeros(model, callback.ticket.masks())
    assert not torch.equal(before["model.norm.weight"], tensors(model)["model.norm.weight"])


def word_tokenizer():
    """A tokenizer of 96 words, made in memory."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
