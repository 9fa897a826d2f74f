"""DSEE in the trainers: stopped and resumed to the bit, in SparseTrainer and TRL's, and compiled."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from dsee.tiny_dsee import (
    adapter_tensors,
    assert_same,
    base_model,
    bits,
    dsee_config,
    dsee_model,
    layers,
    logits,
    stir,
)
from sparse_hf.training.trainer import SparseTrainer
from tiny_models import tiny_inputs, tiny_model
from training.test_trl import word_tokenizer
from training.tiny_training import Crash, CrashAt, tiny_arguments, tiny_classifier, tiny_rows


OPTIONS = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

ONE_LAYER = {"bert": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}


def adapted_classifier(seed=0):
    config = dsee_config("bert", task_type="SEQ_CLS", support="random", seed=seed)
    return get_peft_model(tiny_classifier(), config)


def trainer(folder, trainer_class, model, callbacks=(), **options):
    arguments = tiny_arguments(folder, **{**OPTIONS, **options})
    return trainer_class(model, arguments, train_dataset=tiny_rows(), callbacks=list(callbacks))


def moments(one):
    states = one.optimizer.optimizer.state
    return [value for state in states.values() for value in state.values()]


@pytest.mark.parametrize("trainer_class", [Trainer, SparseTrainer])
def test_resuming_is_exact(tmp_path, trainer_class):
    whole = trainer(tmp_path / "whole", trainer_class, adapted_classifier())
    original = bits(tiny_classifier())
    whole.train()
    with pytest.raises(Crash):
        trainer(tmp_path / "stopped", trainer_class, adapted_classifier(), [CrashAt(5)]).train()
    # The new process drew another support; the checkpoint's comes into force.
    resumed = trainer(tmp_path / "stopped", trainer_class, adapted_classifier(seed=9))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert all(torch.equal(one, two) for one, two in zip(moments(whole), moments(resumed), strict=True))
    assert torch.equal(logits(whole.model.eval()), logits(resumed.model.eval()))
    stock = dict(resumed.model.unload().state_dict())
    assert all(torch.equal(stock[name], original[name]) for name in original if not name.startswith("classifier"))


def test_the_best_checkpoint_is_loaded_back(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps"}
    arguments = tiny_arguments(tmp_path, **{**OPTIONS, **options, "max_steps": 6, "learning_rate": 1.0})
    one = Trainer(adapted_classifier(), arguments, train_dataset=tiny_rows(), eval_dataset=tiny_rows(4))
    one.train()
    best = one.state.best_metric
    assert one.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    assert len({round(entry["eval_loss"], 6) for entry in one.state.log_history if "eval_loss" in entry}) > 1


def test_bfloat16_autocast_in_the_trainer(tmp_path):
    model = adapted_classifier()
    before = adapter_tensors(model)
    trainer(tmp_path, Trainer, model, bf16=True, max_steps=2, save_strategy="no").train()
    after = adapter_tensors(model)
    assert all(one.isfinite().all() for one in after.values() if one.is_floating_point())
    assert any(not torch.equal(before[name], after[name]) for name in before if "values" in name)


@pytest.mark.trl
def test_sft_with_a_config_of_ours(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    rows = [{"input_ids": row["input_ids"].tolist()} for row in tiny_rows()]
    one = trl.SFTTrainer(
        tiny_model("llama", "causal_lm"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=dsee_config("llama"),
    )
    before = adapter_tensors(one.model)
    assert before
    one.train()
    after = adapter_tensors(one.model)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("values.default"))
    assert_same(dict(one.model.unload().state_dict()), bits(base_model("llama")))


@pytest.mark.parametrize("family", ["bert", "gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_compiled_training_is_the_eager_one(family):
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = dsee_model(family, base=base_model(family, **ONE_LAYER[family]))
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        run(**tiny_inputs(model.get_base_model())).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_sees_another_support_and_mask():
    torch._dynamo.reset()

    def tiny(**changes):
        return dsee_model("bert", base=base_model("bert", num_hidden_layers=1), **changes)

    model = tiny()
    run = torch.compile(model, backend="eager")
    first = logits(run)
    other = stir(tiny(support="random", base_sparsity=0.2), seed=4)
    model.load_state_dict({n: t for n, t in other.state_dict().items() if "sparse_hf_dsee" in n}, strict=False)
    torch.testing.assert_close(logits(run), logits(other), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(run), first, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(run), logits(other), atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(run), logits(base_model("bert", num_hidden_layers=1)), atol=1e-5, rtol=1e-4)
    assert all(layer.merged is False for layer in layers(model).values())
