"""A fixed mask in SparseTrainer and, by the callback, in a stock Trainer."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.prune import prune
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.callback import SparsityCallback
from tiny_models import tiny_model
from training.tiny_training import (
    AtStep,
    assert_same,
    assert_zeros,
    same,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_rows,
    tiny_trainer,
)


HALF = StaticSparsityConfig(sparsity=0.5)

SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3},
    "strong weight decay": {"weight_decay": 1.0},
    "no clipping": {"max_grad_norm": 0.0},
    "hard clipping": {"max_grad_norm": 1e-3},
    "sgd momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
}


def watched(folder, as_callback: bool, sparsity: object, **options):
    """A trainer, its sparsity callback, and a watch that checks weights and moments at each step."""
    callbacks = options.pop("callbacks", [])
    if as_callback:
        own = SparsityCallback(sparsity)
        trainer = tiny_trainer(folder, trainer_class=Trainer, callbacks=[*callbacks, own], **options)
    else:
        trainer = tiny_trainer(folder, sparsity, callbacks=callbacks, **options)
        own = trainer._sparsity_callback
    check = lambda model, optimizer, **_: assert_zeros(model, own.keeper.masks(), optimizer.optimizer)  # noqa: E731
    watch = AtStep(check)
    trainer.add_callback(watch)
    return trainer, own, watch


@pytest.mark.parametrize("as_callback", [False, True], ids=["SparseTrainer", "callback"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_zeros_at_each_step(tmp_path, setting, as_callback):
    options = {"max_steps": 4, **SETTINGS[setting]}
    trainer, own, watch = watched(tmp_path, as_callback, HALF, **options)
    before = tensors(trainer.model)
    trainer.train()
    assert watch.calls == options["max_steps"]
    masks = own.ticket.masks()
    assert_zeros(trainer.model, masks)
    assert own.ticket.sparsity == 0.5
    after = tensors(trainer.model)
    assert after.keys() == before.keys()
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_gradient_clipping_sees_the_masked_norm(tmp_path):
    seen = {}

    class Spy(SparsityCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            masks = self.keeper.masks()
            for name, parameter in named_canonical_parameters(model).items():
                if name in masks:
                    assert not parameter.grad[~masks[name]].any()
            seen["norm"] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    trainer = tiny_trainer(tmp_path, HALF, max_grad_norm=1e-3)
    trainer.remove_callback(trainer._sparsity_callback)
    trainer._sparsity_callback = Spy(HALF)
    trainer.add_callback(trainer._sparsity_callback)
    trainer.train()
    assert float(seen["norm"]) == pytest.approx(1e-3, rel=1e-3)  # clipping filled the whole budget with kept weights


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_the_logged_gradient_norm_is_that_of_kept_weights(tmp_path, max_grad_norm):
    """Also without clipping, where NaN in a pruned position would otherwise spread over all gradients."""
    trainer = tiny_trainer(tmp_path, HALF, max_grad_norm=max_grad_norm, logging_strategy="steps", logging_steps=1)
    weight = trainer.model.bert.encoder.layer[0].output.dense.weight

    def poison(gradient):
        mask = trainer._sparsity_callback.keeper.masks()["encoder.layer.0.output.dense.weight"]
        return gradient.masked_fill(~mask, float("nan"))

    weight.register_hook(poison)
    trainer.train()
    norms = [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record]
    assert len(norms) == 6
    assert all(0 < float(norm) < 1e3 for norm in norms)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_without_clipping_the_callback_and_the_trainer_agree_bit_for_bit(tmp_path):
    results = []
    for as_callback in (False, True):
        trainer, own, _ = watched(tmp_path / str(as_callback), as_callback, HALF, max_grad_norm=0.0)
        trainer.train()
        results.append((tensors(trainer.model), own.ticket.masks()))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


def test_with_clipping_they_differ_only_by_the_norm(tmp_path):
    results, norms = [], []
    for as_callback in (False, True):
        options = {
            "max_grad_norm": 0.05,
            "max_steps": 1,
            "optim": "sgd",
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
        }
        options |= {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 1.0}
        trainer, own, _ = watched(tmp_path / str(as_callback), as_callback, HALF, **options)
        start = own._first_masks(trainer.model, None)
        dense = tensors(trainer.model)["classifier.weight"]
        trainer.train()
        assert_same(start, own.ticket.masks())
        results.append(tensors(trainer.model)["classifier.weight"] - dense)
        norms.append(float(next(record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record)))
    assert norms[0] < norms[1]
    # One SGD step: the updates are the same gradient, scaled by budget / norm.
    torch.testing.assert_close(results[0] * norms[0], results[1] * norms[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparsity", [None, StaticSparsityConfig(sparsity=0.0)])
def test_without_zeros_it_is_the_stock_trainer(tmp_path, sparsity):
    stock = tiny_trainer(tmp_path / "stock", trainer_class=Trainer)
    first = stock.train()
    ours = tiny_trainer(tmp_path / "ours", sparsity)  # sets the seed
    second = ours.train()
    assert_same(tensors(stock.model), tensors(ours.model))
    assert first.training_loss == second.training_loss


def test_a_checkpoint_is_a_stock_checkpoint_with_zeros(tmp_path):
    trainer = tiny_trainer(tmp_path, HALF, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(tensors(loaded), tensors(trainer.model))
    assert_zeros(loaded, ticket_masks(trainer))
    assert_same(Ticket.from_pretrained(folder).masks(), ticket_masks(trainer))
    assert json.loads((folder / "sparse_hf.json").read_text())["kind"] == "model"
    trainer.save_model(tmp_path / "final")
    assert_same(Ticket.from_pretrained(tmp_path / "final").masks(), ticket_masks(trainer))


def test_a_second_run_in_the_same_folder_replaces_the_masks_of_the_first(tmp_path):
    for seed in (0, 1):
        config = StaticSparsityConfig(sparsity=0.5, score="random", seed=seed)
        trainer, own, _ = watched(tmp_path, True, config, save_strategy="steps", save_steps=6)
        trainer.train()
        stored = Ticket.from_pretrained(tmp_path / "checkpoint-6")
        assert_same(stored.masks(), own.ticket.masks())
        assert_zeros(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6"), stored.masks())


def test_frozen_parameters_stay_frozen_and_sparse(tmp_path):
    model = tiny_classifier()
    model.bert.encoder.layer[0].requires_grad_(False)
    dense = tensors(model)
    trainer, own, watch = watched(tmp_path, False, HALF, model=model)
    trainer.train()
    assert watch.calls == 6
    masks = own.ticket.masks()
    for name, parameter in named_canonical_parameters(model).items():
        if name.startswith("encoder.layer.0.") and name in masks:
            assert torch.equal(parameter, dense[f"bert.{name}"].where(masks[name], torch.tensor(0.0)))


def test_tied_embeddings_are_untouched(tmp_path):
    model = tiny_model("gpt2", "causal_lm")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny_rows()]
    trainer, own, _ = watched(tmp_path, False, HALF, model=model, train_dataset=rows)
    trainer.train()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any("wte" in name or "lm_head" in name for name in own.ticket.masks())
    assert (model.transformer.wte.weight != 0).all()


def test_training_under_a_ticket(tmp_path):
    ticket = prune(tiny_classifier(), 0.7, score="random", seed=3)
    trainer, own, watch = watched(tmp_path, False, ticket)
    trainer.train()
    assert_same(own.ticket.masks(), ticket.masks())
    first = tensors(trainer.model)
    trainer.train()  # goes on: the weights are no longer those the ticket was found on, and need not be
    assert watch.calls == 12
    assert not same(first, tensors(trainer.model))
    assert_same(own.ticket.masks(), ticket.masks())


def test_a_ticket_of_another_base_is_refused_before_training(tmp_path):
    trainer = tiny_trainer(tmp_path, prune(tiny_classifier(seed=1), 0.5))
    dense = tensors(trainer.model)
    with pytest.raises(ValueError, match="found on other base weights"):
        trainer.train()
    assert_same(dense, tensors(trainer.model))


def test_a_callback_cannot_search():
    with pytest.raises(TypeError, match="use `SparseTrainer"):
        SparsityCallback(LotteryTicketConfig())
    with pytest.raises(TypeError, match="got float"):
        SparsityCallback(0.5)


def test_there_is_no_ticket_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="masks are drawn when training begins"):
        _ = tiny_trainer(tmp_path, HALF).ticket
    with pytest.raises(RuntimeError, match="has no `sparsity`"):
        _ = tiny_trainer(tmp_path).ticket
    trainer = tiny_trainer(tmp_path, HALF)
    trainer.save_model(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / MASKS_FILE).exists()
