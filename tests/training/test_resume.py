"""A training that stopped and goes on is the training that did not stop, bit for bit."""

import shutil

import pytest
import torch
from transformers import Trainer

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.prune import prune
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.callback import SparsityCallback
from training.tiny_training import (
    AtBegin,
    Crash,
    CrashAt,
    assert_same,
    assert_zeros,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_trainer,
)


CONFIGS = {
    "gradual": GradualPruningConfig(sparsity=0.7, end_step=6, every=2),
    "gradual random": GradualPruningConfig(sparsity=0.7, end_step=6, every=1, score="random"),
    "gradual gradient": GradualPruningConfig(sparsity=0.7, end_step=6, every=2, score="gradient"),
    "static": StaticSparsityConfig(sparsity=0.5),
}
LONG = {"max_steps": 7, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}


def moments(trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.optimizer.state
    return {
        f"{name} {key}": value.clone()
        for name, parameter in named_canonical_parameters(trainer.model).items()
        for key, value in state[parameter].items()
    }


def stopped_and_resumed(tmp_path, config, step, **options):
    """A run that crashes at the end of `step`, and the trainer that continued it (from the checkpoint before)."""
    options = {**LONG, **options}
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, config, callbacks=[CrashAt(step)], **options).train()
    resumed = tiny_trainer(tmp_path, config, model=tiny_classifier(seed=9), **options)
    resumed.train(resume_from_checkpoint=True)
    return resumed


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [3, 5])
def test_resuming_is_exact(tmp_path, name, step):
    whole = tiny_trainer(tmp_path / "whole", CONFIGS[name], **LONG)
    whole.train()
    resumed = stopped_and_resumed(tmp_path / "stopped", CONFIGS[name], step)
    assert resumed.state.global_step == 7
    assert_same(tensors(whole.model), tensors(resumed.model))
    assert_same(ticket_masks(whole), ticket_masks(resumed))
    assert_same(moments(whole), moments(resumed))


def test_resuming_a_ticket_does_not_ask_for_its_base_again(tmp_path):
    ticket = prune(tiny_classifier(), 0.5)
    whole = tiny_trainer(tmp_path / "whole", ticket, **LONG)
    whole.train()
    resumed = stopped_and_resumed(tmp_path / "stopped", ticket, 4)
    assert_same(tensors(whole.model), tensors(resumed.model))


@pytest.mark.parametrize("last", [7, 6], ids=["in the middle of an epoch", "at the end of one"])
def test_resuming_a_finished_run_trains_no_further_step(tmp_path, last):
    options = {**LONG, "max_steps": last}
    whole = tiny_trainer(tmp_path, CONFIGS["gradual"], **options)
    whole.train()
    resumed = tiny_trainer(tmp_path, CONFIGS["gradual"], model=tiny_classifier(seed=9), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == last
    assert_same(tensors(whole.model), tensors(resumed.model))


def test_a_finished_run_can_be_trained_longer(tmp_path):
    options = {**LONG, "max_steps": 4, "lr_scheduler_type": "constant"}
    tiny_trainer(tmp_path, CONFIGS["static"], **options).train()
    longer = tiny_trainer(tmp_path, CONFIGS["static"], **{**options, "max_steps": 6})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6
    whole = tiny_trainer(tmp_path / "whole", CONFIGS["static"], **{**options, "max_steps": 6})
    whole.train()
    assert_same(tensors(whole.model), tensors(longer.model))


@pytest.mark.parametrize("as_callback", [False, True])
def test_masks_come_from_the_file_and_not_from_the_zeros(tmp_path, as_callback):
    """A kept weight that is exactly zero when the checkpoint is written stays trainable."""
    name = "encoder.layer.0.output.dense.weight"
    config = StaticSparsityConfig(sparsity=0.5, score="random")
    options = {**LONG, "max_grad_norm": 0.0}

    def trainer(**more):
        if not as_callback:
            made = tiny_trainer(tmp_path, config, **options, **more)
            return made, made._sparsity_callback
        own = SparsityCallback(config)
        more["callbacks"] = [own, *more.get("callbacks", [])]
        return tiny_trainer(tmp_path, trainer_class=Trainer, **options, **more), own

    first, own = trainer(callbacks=[CrashAt(5)])
    with pytest.raises(Crash):
        first.train()
    masks = own.ticket.masks()
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    stored = load_file(weights)
    position = tuple(masks[name].nonzero()[0].tolist())
    stored[f"bert.{name}"][position] = 0.0
    save_file(stored, weights, metadata={"format": "pt"})

    second, own = trainer()
    begins = []
    second.add_callback(AtBegin(lambda model, **_: begins.append(model.bert.get_parameter(name)[position].item())))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert begins == [0.0]
    assert_same(own.ticket.masks(), masks)
    assert second.model.bert.get_parameter(name)[position].item() != 0.0
    assert_zeros(second.model, masks)


@pytest.mark.parametrize("as_callback", [False, True])
def test_a_checkpoint_without_masks_is_an_error(tmp_path, as_callback):
    def trainer():
        if as_callback:
            own = SparsityCallback(CONFIGS["static"])
            return tiny_trainer(tmp_path, trainer_class=Trainer, callbacks=[own], **LONG)
        return tiny_trainer(tmp_path, CONFIGS["static"], **LONG)

    trainer().train()
    (tmp_path / "checkpoint-4" / MASKS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="holds no `sparse_masks.safetensors`"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_callback_reads_the_masks_of_a_checkpoint_elsewhere(tmp_path):
    config = CONFIGS["gradual"]
    whole_callback = SparsityCallback(config)
    whole = tiny_trainer(tmp_path / "whole", trainer_class=Trainer, callbacks=[whole_callback], **LONG)
    whole.train()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", elsewhere)
    callback = SparsityCallback(config, resume_from=elsewhere)
    resumed = tiny_trainer(tmp_path / "new", trainer_class=Trainer, callbacks=[callback], **LONG)
    resumed.train(resume_from_checkpoint=str(elsewhere))
    assert_same(tensors(whole.model), tensors(resumed.model))
    assert_same(whole_callback.ticket.masks(), callback.ticket.masks())


def test_masks_of_another_run_are_refused(tmp_path):
    """Resumed from elsewhere without `resume_from`, the folder of the same step may belong to another run."""
    for folder, seed in (("a", 0), ("b", 1)):
        callback = SparsityCallback(StaticSparsityConfig(sparsity=0.5, score="random", seed=seed))
        tiny_trainer(tmp_path / folder, trainer_class=Trainer, callbacks=[callback], **LONG).train()
    trainer = tiny_trainer(tmp_path / "b", trainer_class=Trainer, callbacks=[callback], **LONG)
    with pytest.raises(ValueError, match="are not those of the weights"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="needs a complete checkpoint"):
        tiny_trainer(tmp_path, CONFIGS["static"]).train(resume_from_checkpoint=True)


def test_a_ticket_of_a_checkpoint_says_what_it_is(tmp_path):
    tiny_trainer(tmp_path, CONFIGS["gradual"], **LONG).train()
    ticket = Ticket.from_pretrained(tmp_path / "checkpoint-7")
    assert ticket.origin.method == "gradual_pruning"
    assert ticket.origin.config["end_step"] == 6
    assert ticket.sparsity == pytest.approx(0.7, abs=1 / 4352)
