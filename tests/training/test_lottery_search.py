"""Iterative magnitude pruning with rewinding: counts, rewinding, the head, new optimizers, the final training."""

import pytest
import torch
from transformers import TrainerCallback

from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import LotteryTicketConfig
from sparse_hf.tickets.ticket import Ticket
from training.tiny_training import (
    AtBegin,
    AtStep,
    assert_same,
    assert_zeros,
    same,
    tensors,
    ticket_masks,
    tiny_classifier,
    tiny_trainer,
)


WEIGHTS = 4352
HEAD = ("classifier.weight", "classifier.bias")


def ticket_of_round(folder, number: int) -> dict[str, torch.Tensor]:
    return Ticket.from_pretrained(folder / f"round-{number}" / "ticket").masks()


def kept(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def model_that_counts() -> torch.nn.Module:
    """With a persistent buffer that every forward pass changes, as batch norms have."""
    model = tiny_classifier()
    model.bert.register_buffer("seen", torch.zeros(()))
    model.bert.register_forward_hook(lambda module, *_: module.seen.add_(1) and None)
    return model


def searched(folder, config: LotteryTicketConfig, model=None, **options):
    """A finished search, and the model's tensors at the begin of each of its trainings."""
    begins = []
    look = AtBegin(lambda model, **_: begins.append(tensors(model)))
    options = {"max_steps": 4, **options}
    trainer = tiny_trainer(folder, config, model=model, callbacks=[look], **options)
    trainer.train()
    return trainer, begins


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rounds": 3, "sparsity": 0.6}, [0.2, 0.4, 0.6]),
        ({"per_round": 0.3, "sparsity": 0.6}, [0.3, 0.6]),
        ({"rounds": 2, "sparsity": 0.75, "schedule": "geometric"}, [0.5, 0.75]),
        ({"rounds": 2, "sparsity": 0.6, "budget": "uniform"}, [0.3, 0.6]),
        ({"rounds": 2, "sparsity": 0.6, "budget": "erdos_renyi"}, [0.3, 0.6]),
        ({"rounds": 2, "sparsity": 0.6, "score": "gradient", "score_batches": 2}, [0.3, 0.6]),
        ({"rounds": 2, "sparsity": 0.6, "score": "random"}, [0.3, 0.6]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_counts_are_exact_and_masks_nested(tmp_path, options, expected):
    trainer, _ = searched(tmp_path, LotteryTicketConfig(round_steps=2, final_training=False, **options))
    rounds = [ticket_of_round(tmp_path, number) for number in range(1, len(expected) + 1)]
    assert [kept(masks) for masks in rounds] == [round(WEIGHTS * (1 - sparsity)) for sparsity in expected]
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)
    assert_same(ticket_masks(trainer), rounds[-1])
    assert_same(Ticket.from_pretrained(tmp_path / "ticket").masks(), rounds[-1])
    densities = {round(float(mask.float().mean()), 2) for mask in rounds[-1].values()}
    assert (len(densities) == 1) == (options.get("budget") == "uniform")


def test_the_mask_keeps_the_largest_trained_weights(tmp_path):
    config = LotteryTicketConfig(sparsity=0.5, rounds=1, final_training=False)
    trainer = tiny_trainer(tmp_path, config, max_steps=4)
    values = {}
    trainer.add_callback(AtStep(lambda model, **_: values.update(tensors(model))))
    trainer.train()
    masks = ticket_masks(trainer)
    kept_values = torch.cat([values[f"bert.{name}"][mask].abs() for name, mask in masks.items()])
    pruned_values = torch.cat([values[f"bert.{name}"][~mask].abs() for name, mask in masks.items()])
    assert pruned_values.max() <= kept_values.min()


@pytest.mark.parametrize("rewind_head", [False, True])
def test_rewinding_is_bit_exact(tmp_path, rewind_head):
    model = model_that_counts()
    start = tensors(model)
    config = LotteryTicketConfig(sparsity=0.6, rounds=3, rewind_head=rewind_head)
    heads = []  # after each training's last step
    watch = AtStep(lambda step, model, **_: step == 4 and heads.append(tensors(model)))
    begins = []
    look = AtBegin(lambda model, **_: begins.append(tensors(model)))
    tiny_trainer(tmp_path, config, model=model, callbacks=[look, watch], max_steps=4).train()
    assert len(begins) == 4  # three rounds and the final training
    assert any("LayerNorm" in name for name in start)
    assert "bert.seen" in start
    for number, begin in enumerate(begins):
        base = {name for name in start if name not in HEAD}
        assert_same({name: begin[name] for name in base}, {name: start[name] for name in base})
        for name in HEAD:
            is_first = number in (0, 3) or rewind_head
            expected = start if is_first else heads[number - 1]
            assert torch.equal(begin[name], expected[name]), (number, name)
            assert is_first or not torch.equal(begin[name], start[name])


def test_late_rewinding_goes_to_the_step_of_the_dense_round(tmp_path):
    at_two = []
    watch = AtStep(lambda step, model, **_: step == 2 and at_two.append(tensors(model)))
    trainer = tiny_trainer(tmp_path, LotteryTicketConfig(sparsity=0.5, rounds=2, rewind_step=2), max_steps=4)
    begins = []
    trainer.add_callback(watch)
    trainer.add_callback(AtBegin(lambda model, **_: begins.append(tensors(model))))
    start = tensors(trainer.model)
    trainer.train()
    assert_same(begins[0], start)

    for begin, masks in zip(begins[1:], (ticket_of_round(tmp_path, 1), ticket_of_round(tmp_path, 2)), strict=True):
        for name, value in begin.items():
            if name not in HEAD:
                rewound = at_two[0][name]
                mask = masks.get(name.removeprefix("bert."), torch.ones_like(rewound, dtype=torch.bool))
                assert torch.equal(value[mask], rewound[mask]), name
    assert torch.equal(begins[-1]["classifier.weight"], at_two[0]["classifier.weight"])


def test_each_training_has_a_new_optimizer_and_scheduler(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, lr_scheduler, **kwargs):
            first = next(iter(optimizer.optimizer.state.values()))
            seen.append((state.global_step, int(first["step"]), round(lr_scheduler.get_last_lr()[0], 6), optimizer))

    tiny_trainer(tmp_path, LotteryTicketConfig(sparsity=0.5, rounds=2), callbacks=[Spy()], max_steps=4).train()
    steps = [1, 2, 3, 4] * 3
    assert [one[:2] for one in seen] == [(step, step) for step in steps]
    assert [one[2] for one in seen] == [0.0075, 0.005, 0.0025, 0.0] * 3
    assert len({id(one[3]) for one in seen}) == 3


def test_rounds_can_be_shorter_than_the_final_training(tmp_path):
    lengths = []
    trainer = tiny_trainer(tmp_path, LotteryTicketConfig(sparsity=0.5, rounds=2, round_epochs=0.5), max_steps=6)
    trainer.add_callback(AtBegin(lambda state, **_: lengths.append(state.max_steps)))
    output = trainer.train()
    assert lengths == [2, 2, 6]  # an epoch is 4 steps
    assert output.global_step == 6
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.args.max_steps == 6


def test_the_final_training_is_a_fresh_training_of_the_ticket(tmp_path):
    search, _ = searched(tmp_path / "search", LotteryTicketConfig(sparsity=0.5, rounds=2))
    fresh = tiny_trainer(tmp_path / "fresh", Ticket.from_pretrained(tmp_path / "search" / "ticket"), max_steps=4)
    fresh.train()
    assert_same(tensors(search.model), tensors(fresh.model))
    assert_zeros(search.model, ticket_masks(search))


def test_without_final_training_the_model_is_the_rewound_ticket(tmp_path):
    start = tensors(tiny_classifier())
    config = LotteryTicketConfig(sparsity=0.6, rounds=2, final_training=False)
    trainer, begins = searched(tmp_path, config)
    assert len(begins) == 2
    masks = ticket_masks(trainer)
    for name, value in tensors(trainer.model).items():
        mask = masks.get(name.removeprefix("bert."))
        assert torch.equal(value, start[name] if mask is None else start[name].where(mask, torch.tensor(0.0)))
    trainer.save_model(tmp_path / "model")
    assert (tmp_path / "model" / MASKS_FILE).is_file()
    assert_same(Ticket.from_pretrained(tmp_path / "model").masks(), masks)


def test_zeros_hold_at_each_step_of_each_round(tmp_path):
    checked = []
    trainer = tiny_trainer(tmp_path, LotteryTicketConfig(sparsity=0.6, rounds=2), max_steps=3, bf16=True)

    def check(model, optimizer, **_):
        if (callback := trainer._sparsity_callback) is not None:
            assert_zeros(model, callback.keeper.masks(), optimizer.optimizer)
            checked.append(callback.keeper.sparsity)

    trainer.add_callback(AtStep(check))
    trainer.train()
    assert checked == pytest.approx([0.3] * 3 + [0.6] * 3, abs=1 / WEIGHTS)


def test_rounds_differ_from_one_shot_pruning(tmp_path):
    """The second round prunes what the first ticket, trained from rewound weights, made small."""
    two, _ = searched(tmp_path / "two", LotteryTicketConfig(sparsity=0.6, rounds=2, final_training=False))
    one, _ = searched(tmp_path / "one", LotteryTicketConfig(sparsity=0.6, rounds=1, final_training=False))
    assert not same(ticket_masks(two), ticket_masks(one))
    again, _ = searched(tmp_path / "again", LotteryTicketConfig(sparsity=0.6, rounds=2, final_training=False))
    assert_same(ticket_masks(two), ticket_masks(again))
