"""Do S2's places move by the rule, with their moments, and the same after a resume?"""

import pytest
import torch

from sparse_hf.dsee.masks import adapted_layers
from sparse_hf.training.dsee_moves import DseeSupportCallback
from training.tiny_dsee import plain_trainer, tiny_dsee
from training.tiny_training import AtStep, Crash, CrashAt, assert_same, tensors


def supports(model):
    layers = adapted_layers(model, "default")
    return {n: one.sparse_hf_dsee_indices["default"].clone() for n, one in layers.items() if not n.endswith("key")}


def test_moves_come_at_their_steps_and_end(tmp_path):
    seen = []
    look = AtStep(lambda model, **_: seen.append(supports(model)))
    move = DseeSupportCallback(every=2, drop_fraction=0.5, end_fraction=0.7)
    plain_trainer(tmp_path, [move, look]).train()
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, False, True, False, False]  # after steps 2 and 4; step 6 is past 70 %
    for name in seen[0]:
        stayed = torch.isin(seen[0][name], seen[1][name]).sum()
        assert stayed == 4, name  # half of the 8 entries
        assert seen[1][name].unique().numel() == 8


def test_values_and_moments_go_with_their_entries(tmp_path):
    held = []

    def look(model, optimizer, **_):
        found = {}
        for name, layer in adapted_layers(model, "default").items():
            if "default" in layer.sparse_hf_dsee_values:
                values = layer.sparse_hf_dsee_values["default"]
                indices = layer.sparse_hf_dsee_indices["default"].tolist()
                moment = optimizer.state[values]["exp_avg"].tolist()
                found[name] = dict(zip(indices, zip(values.tolist(), moment, strict=True), strict=True))
        held.append(found)

    # The callback that looks first sees the state before the move of the same step: `on_optimizer_step` comes earlier.
    plain_trainer(tmp_path, [DseeSupportCallback(every=3, drop_fraction=0.5), AtStep(look)], max_steps=4).train()
    for name, after in held[2].items():
        before = held[1][name]
        new = [place for place in after if place not in before]
        assert len(new) == 4
        assert all(after[place] == (0.0, 0.0) for place in new)
        assert all(after[place] != (0.0, 0.0) for place in after if place in before)


def test_resume_moves_alike(tmp_path):
    move = dict(every=1, drop_fraction=0.5, end_fraction=1.0)
    options = dict(save_strategy="steps", save_steps=1)
    whole = plain_trainer(tmp_path / "whole", [DseeSupportCallback(**move)], **options)
    whole.train()
    with pytest.raises(Crash):
        plain_trainer(tmp_path / "cut", [DseeSupportCallback(**move), CrashAt(4)], **options).train()
    resumed = plain_trainer(tmp_path / "cut", [DseeSupportCallback(**move)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(tensors(whole.model), tensors(resumed.model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(every=0), "at least 1"),
        (dict(candidates=0), "at least 1"),
        (dict(drop_fraction=0.0), r"`drop_fraction` must be in \(0, 1\]"),
        (dict(end_fraction=1.5), r"`end_fraction` must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        DseeSupportCallback(**values)


def test_nothing_to_move(tmp_path):
    trainer = plain_trainer(tmp_path, [DseeSupportCallback(every=1)], tiny_dsee(nnz=0))
    with pytest.raises(ValueError, match="`nnz` is 0"):
        trainer.train()
