"""The picture at the end of a training shows what the last evaluation's tokens chose."""

import pytest
import torch
from transformers import TrainerState

from pretended_packages import pretend
from sparse_hf import ExpertLoadCallback, expert_usage
from sparse_hf.hub import expert_load_callback
from training.tiny_balance import mixtral, rows, trainer


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, instead of pictures."""
    calls = []
    monkeypatch.setattr(expert_load_callback, "plot_expert_load", lambda *given: calls.append(given))
    pretend(monkeypatch, "matplotlib", installed=True)
    return calls


def counted(model, count=8):
    usage = expert_usage(model.eval(), [{name: one[None] for name, one in row.items()} for row in rows(count)])
    return torch.stack(list(usage.counts.values()))


EVALUATED = dict(max_steps=4, eval_strategy="steps", eval_steps=2, learning_rate=1e-3)


def test_counts_are_those_of_the_last_evaluation(tmp_path, drawn):
    callback, model = ExpertLoadCallback(), mixtral()
    training = trainer(tmp_path, None, model, callbacks=[callback], eval_dataset=rows(), **EVALUATED)
    training.train()
    assert list(callback.counts) == [2, 4]
    ((counts, path, title, layers),) = drawn
    assert torch.equal(counts, counted(model))
    assert torch.equal(counts, callback.counts[4])
    assert path == tmp_path / "expert_load.png"
    assert title == "Expert load in the evaluation after step 4"
    assert layers == [0, 1]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_all_evaluation_sets_count(tmp_path, drawn):
    callback, model = ExpertLoadCallback(tmp_path / "pictures" / "one.svg"), mixtral()
    sets = {"first": rows(), "second": rows(3)}
    trainer(tmp_path, None, model, callbacks=[callback], eval_dataset=sets, **EVALUATED).train()
    ((counts, path, *_),) = drawn
    assert torch.equal(counts, counted(model) + counted(model, 3))
    assert path == tmp_path / "pictures" / "one.svg"
    assert path.parent.is_dir()


def test_the_best_model_shows_its_own(tmp_path, drawn):
    callback = ExpertLoadCallback()
    callback.counts = {2: torch.ones(1, 4), 4: torch.zeros(1, 4)}
    args = trainer(tmp_path, None).args
    state = TrainerState(best_global_step=2, best_model_checkpoint="checkpoint-2")
    callback.on_train_end(args, state, None)
    assert drawn == []  # the last one's counts are none
    args.load_best_model_at_end = True
    callback.on_train_end(args, state, None)
    ((counts, *_),) = drawn
    assert counts.tolist() == [[1] * 4]


def test_without_evaluation_it_refuses_at_once(tmp_path, drawn):
    training = trainer(tmp_path, None, callbacks=[ExpertLoadCallback()])
    with pytest.raises(ValueError, match="counts in evaluations, but `eval_strategy` is 'no'"):
        training.train()


def test_masks_that_do_not_tell_padding_are_an_error(tmp_path, drawn):
    callback, model = ExpertLoadCallback(), mixtral()
    args = trainer(tmp_path, None, model, eval_dataset=rows(), **EVALUATED).args
    callback.on_train_begin(args, TrainerState(), None, model=model)
    model.train()(torch.ones(2, 5).long())
    assert callback._running.sum() == 0  # training does not count
    with pytest.raises(ValueError, match=r"must tell padding of the 10 tokens as \(batch, length\)"):
        model.eval()(torch.ones(2, 5).long(), attention_mask=torch.ones(2, 1, 5, 5))


def test_without_matplotlib_the_training_does_not_begin(monkeypatch):
    pretend(monkeypatch, "matplotlib", installed=False)
    with pytest.raises(ImportError, match="A picture needs matplotlib"):
        ExpertLoadCallback()
