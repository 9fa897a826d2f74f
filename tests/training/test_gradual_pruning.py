"""Zhu and Gupta's schedule in a training."""

import pytest
import torch
from transformers import Trainer

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import GradualPruningConfig
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.callback import SparsityCallback
from training.tiny_training import (
    AtStep,
    assert_same,
    assert_zeros,
    same,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_trainer,
)


WEIGHTS = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 16  # two layers and the pooler: 4352


def pruned_counts(tmp_path, config: GradualPruningConfig, **options) -> tuple[list[int], list[dict]]:
    """Pruned weights and masks after each step; weights and moments are checked on the way."""
    counts, history = [], []
    trainer = tiny_trainer(tmp_path, config, **options)

    def check(model, optimizer, **_):
        masks = trainer._sparsity_callback.keeper.masks()
        assert_zeros(model, masks, optimizer.optimizer)
        counts.append(sum(int((~mask).sum()) for mask in masks.values()))
        history.append(masks)

    trainer.add_callback(AtStep(check))
    trainer.train()
    assert_zeros(trainer.model, ticket_masks(trainer))
    return counts, history


def test_the_cubic_schedule_by_hand(tmp_path):
    config = GradualPruningConfig(sparsity=0.8, initial_sparsity=0.2, start_step=2, end_step=8, every=2)
    counts, history = pruned_counts(tmp_path, config, max_steps=10)
    # 0.8 - 0.6 * (1 - t)^3 at t = 0, 1/3, 2/3, 1: dense before step 2, constant between updates and after step 8.
    by_hand = [0.0, 0.2, 0.2, 0.8 - 0.6 * 8 / 27, 0.8 - 0.6 * 8 / 27, 0.8 - 0.6 / 27, 0.8 - 0.6 / 27, 0.8, 0.8, 0.8]
    assert counts == [WEIGHTS - round(WEIGHTS * (1 - sparsity)) for sparsity in by_hand]
    for earlier, later in zip(history, history[1:], strict=False):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)  # nested


def test_the_end_step_is_met_exactly_between_two_updates(tmp_path):
    counts, _ = pruned_counts(tmp_path, GradualPruningConfig(sparsity=0.5, end_step=5, every=3), max_steps=6)
    assert counts[:2] == [0, 0]
    assert counts[2] == counts[3] == WEIGHTS - round(WEIGHTS * (0.5 + 0.5 * (2 / 5) ** 3))
    assert counts[4] == counts[5] == WEIGHTS // 2


def test_pruning_ends_by_default_after_two_thirds(tmp_path):
    counts, _ = pruned_counts(tmp_path, GradualPruningConfig(sparsity=0.5, every=1), max_steps=9)
    assert counts[4] < counts[5] == counts[8] == WEIGHTS // 2


def test_the_initial_sparsity_holds_from_the_first_step_when_pruning_starts_at_zero(tmp_path):
    config = GradualPruningConfig(sparsity=0.5, initial_sparsity=0.25, end_step=4, every=4)
    counts, _ = pruned_counts(tmp_path, config, max_steps=5)
    assert counts == [WEIGHTS // 4] * 3 + [WEIGHTS // 2] * 2


@pytest.mark.parametrize(
    "options",
    [{"score": "gradient"}, {"score": "random", "seed": 3}, {"budget": "uniform"}, {"budget": "erdos_renyi"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_scores_and_budgets_end_at_the_exact_count(tmp_path, options):
    counts, history = pruned_counts(
        tmp_path, GradualPruningConfig(sparsity=0.7, end_step=4, every=1, **options), max_steps=5
    )
    assert counts[3] == counts[4] == WEIGHTS - round(WEIGHTS * 0.3)
    assert counts == sorted(counts)
    for earlier, later in zip(history, history[1:], strict=False):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)


def test_a_gradient_score_names_the_weight_that_has_no_gradient(tmp_path):
    model = tiny_classifier()
    model.bert.encoder.layer[0].requires_grad_(False)
    config = GradualPruningConfig(sparsity=0.5, end_step=2, every=1, score="gradient")
    with pytest.raises(ValueError, match=r"needs gradients, `encoder\.layer\.0\..*` has none"):
        tiny_trainer(tmp_path, config, model=model).train()


@pytest.mark.parametrize("steps", [{"end_step": 7}, {"start_step": 6}])
def test_a_schedule_beyond_the_training_is_refused_before_the_first_step(tmp_path, steps):
    trainer = tiny_trainer(tmp_path, GradualPruningConfig(sparsity=0.5, **steps), max_steps=6)
    dense = tensors(trainer.model)
    with pytest.raises(ValueError, match="must end within the training's 6 steps, got `end_step`=7"):
        trainer.train()
    assert_same(dense, tensors(trainer.model))


def test_trainer_and_callback_prune_alike_without_clipping(tmp_path):
    config = GradualPruningConfig(sparsity=0.5, end_step=4, every=1)
    ours = tiny_trainer(tmp_path / "ours", config, max_grad_norm=0.0)
    ours.train()
    callback = SparsityCallback(config)
    stock = tiny_trainer(tmp_path / "stock", trainer_class=Trainer, callbacks=[callback], max_grad_norm=0.0)
    stock.train()
    assert_same(tensors(ours.model), tensors(stock.model))
    assert_same(ticket_masks(ours), callback.ticket.masks())


def test_the_best_checkpoint_comes_back_with_its_own_masks(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    config = GradualPruningConfig(sparsity=0.6, end_step=6, every=1)
    trainer = tiny_trainer(
        tmp_path,
        config,
        eval_dataset=[{"input_ids": torch.tensor([5, 6]), "labels": 0}],
        compute_metrics=lambda _: {"score": next(losses)},
        metric_for_best_model="score",
        greater_is_better=False,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = Ticket.from_pretrained(tmp_path / "checkpoint-4").masks()
    last = Ticket.from_pretrained(tmp_path / "checkpoint-6").masks()
    assert not same(best, last)
    assert_same(ticket_masks(trainer), best)
    for name, parameter in named_canonical_parameters(trainer.model).items():
        if name in best:
            assert torch.equal(parameter != 0, best[name]), name  # neither more nor fewer zeros than the best's
    trainer.save_model(tmp_path / "final")
    assert_same(Ticket.from_pretrained(tmp_path / "final").masks(), best)
    assert (tmp_path / "final" / MASKS_FILE).is_file()
