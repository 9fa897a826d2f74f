"""Does S1 come at its steps, by the updates, in any Trainer, and back after a resume?"""

import pytest
import torch
from peft import PeftModel

from sparse_hf import DseeMaskingCallback, DseeMaskingConfig
from sparse_hf.dsee.masks import adapted_layers, unstructured_masks
from training.tiny_dsee import masks_of, plain_trainer, tiny_dsee, zeros_in
from training.tiny_training import AtStep, Crash, CrashAt, assert_same, tensors, tiny_classifier


def sparsities(folder, config, **options):
    """The share of zeros in query, value and key after each of six steps."""
    seen = []
    look = AtStep(lambda model, **_: seen.append((zeros_in(model, "query"), zeros_in(model, "key"))))
    trainer = plain_trainer(folder, [DseeMaskingCallback(config), look], **options)
    trainer.train()
    return seen, trainer.model


def test_one_shot(tmp_path):
    seen, model = sparsities(tmp_path, DseeMaskingConfig(0.5, start_step=3))
    assert seen[:2] == [(0, 0), (0, 0)]
    assert [key for _, key in seen[2:]] == [0.5] * 4
    assert zeros_in(model, "query") + zeros_in(model, "value") == pytest.approx(1)  # one group, ranked together


def test_before_the_first_step_only_the_frozen_weights_can_rank(tmp_path):
    seen, _ = sparsities(tmp_path, DseeMaskingConfig(0.25, score="weight"))
    assert [key for _, key in seen] == [0.25] * 6


def test_gradual(tmp_path):
    seen, _ = sparsities(tmp_path, DseeMaskingConfig(0.5, start_step=1, end_step=5, every=2))
    # step 3 is half-way: 0.5 (1 - 0.5 ** 3)
    assert [key for _, key in seen] == [0, 0, 0.4375, 0.4375, 0.5, 0.5]


@pytest.mark.parametrize("score", ["update", "weight_and_update", "weight"])
def test_the_score_ranks_the_tuned_matrices(tmp_path, score):
    trainer = plain_trainer(tmp_path, [])
    trainer.train()
    layers = adapted_layers(trainer.model, "default")
    masks = unstructured_masks(layers, "default", 0.5, score)
    tuned = [name for name in layers if not name.endswith("key")]
    assert len(tuned) == 4
    frozen = {name: layers[name].frozen_weight() for name in layers}
    update = {name: layers[name].get_delta_weight("default").detach() for name in layers}
    scores = {"update": lambda n: update[n].abs(), "weight": lambda n: frozen[n].abs()}
    scores["weight_and_update"] = lambda n: update[n].abs() + frozen[n].abs()
    kept = torch.cat([scores[score](name)[masks[name]] for name in tuned])
    gone = torch.cat([scores[score](name)[~masks[name]] for name in tuned])
    assert kept.numel() == gone.numel()
    assert kept.min() >= gone.max()
    keys = [name for name in layers if name.endswith("key")]
    kept = torch.cat([frozen[name].abs()[masks[name]] for name in keys])
    assert kept.min() >= torch.cat([frozen[name].abs()[~masks[name]] for name in keys]).max()


def test_resume_goes_on_with_the_masks(tmp_path):
    config = DseeMaskingConfig(0.5, start_step=1, end_step=5, every=1)
    options = dict(save_strategy="steps", save_steps=1)
    whole = plain_trainer(tmp_path / "whole", [DseeMaskingCallback(config)], **options)
    whole.train()
    with pytest.raises(Crash):
        plain_trainer(tmp_path / "cut", [DseeMaskingCallback(config), CrashAt(4)], **options).train()
    resumed = plain_trainer(tmp_path / "cut", [DseeMaskingCallback(config)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(masks_of(whole.model), masks_of(resumed.model))
    assert_same(tensors(whole.model), tensors(resumed.model))


def test_saved_and_loaded(tmp_path):
    _, model = sparsities(tmp_path / "run", DseeMaskingConfig(0.5, start_step=2))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_classifier(), tmp_path / "adapter")
    assert_same(masks_of(model), masks_of(loaded))
    ids = torch.arange(5, 10)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DseeMaskingConfig(0.5, start_step=7), {}, "training of 6 steps, got step 7"),
        (
            DseeMaskingConfig(0.5, start_step=2),
            dict(
                load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2
            ),
            "before S1 was complete",
        ),
    ],
)
def test_refused_before_the_first_step(tmp_path, config, options, message):
    trainer = plain_trainer(tmp_path, [DseeMaskingCallback(config)], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_an_adapter(tmp_path):
    trainer = plain_trainer(tmp_path, [DseeMaskingCallback(DseeMaskingConfig(0.5))], model=tiny_classifier())
    with pytest.raises(ValueError, match="exactly one active DSEE adapter, got none"):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(sparsity=1.0), r"in \(0, 1\)"),
        (dict(sparsity=0.0), r"in \(0, 1\)"),
        (dict(score="size"), "one of update, weight_and_update, weight"),
        (dict(start_step=-1), "at least 0"),
        (dict(every=0), "at least 1"),
        (dict(start_step=5, end_step=4), "must not be before"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        DseeMaskingConfig(**values)


def test_the_adapter_stays_whole_when_nothing_is_masked():
    model = tiny_dsee()
    assert masks_of(model) == {}
    assert zeros_in(model, "key") == 0


def test_a_pattern_is_not_replaced_without_a_word(tmp_path):
    trainer = plain_trainer(tmp_path, [DseeMaskingCallback(DseeMaskingConfig(0.5))], tiny_dsee(base_pattern="2:4"))
    with pytest.raises(ValueError, match="would replace S1 of the pattern 2:4"):
        trainer.train()
