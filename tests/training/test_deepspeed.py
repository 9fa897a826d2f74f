"""Two processes under DeepSpeed ZeRO come to the masks and zeros of one process."""

import dataclasses
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import find_sites
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.draw import draw_masks
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.ticket import Ticket
from sparse_hf.training.callback import SparsityCallback
from training.search_processes import EARLY, EVALUATED, STEPS, check_early, check_late
from training.tiny_training import assert_same
from training.two_processes import found_by_both, run_two
from training.zero_processes import (
    CASES,
    COMPARED,
    RESUMED,
    SEARCHED_UNDER_ZERO_2,
    VARIANTS,
    plain_trainer,
    tied_classifier,
    tiny_mixture,
)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
]


def magnitude_masks(model, sparsity=0.6):
    return draw_masks(find_sites(model), named_canonical_parameters(model), sparsity)


def save_ticket(folder):
    """Of the base that is trained, and it says so."""
    parameters = named_canonical_parameters(tied_classifier())
    ticket = Ticket.from_masks(magnitude_masks(tied_classifier(), 0.5))
    mark = base_fingerprint(parameters, ticket.bits)
    ticket.origin = dataclasses.replace(ticket.origin, base_fingerprint=mark)
    ticket.save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, and by run and kind ("weight", "mask") the whole tensors that both processes came to."""
    folder = tmp_path_factory.mktemp("zero")
    save_ticket(folder / "ticket")
    run_two("training.zero_processes", "run_one_process", folder, DS_ACCELERATOR="cpu")
    return folder, found_by_both(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By case, masks and weights of one process whose clip norm is of unmasked gradients, as DeepSpeed's is."""
    found = {}
    for case, config in CASES.items():
        callback = SparsityCallback(config)
        trainer = plain_trainer(tmp_path_factory.mktemp(case), None, 4, trainer_class=Trainer, callbacks=[callback])
        trainer.train()
        weights = {name: one.detach() for name, one in named_canonical_parameters(trainer.model).items()}
        found[case] = callback.ticket.masks(), weights
    return found


@pytest.mark.parametrize("run", COMPARED)
def test_masks_and_weights_are_those_of_one_process(runs, alone, run):
    found = runs[1][run]
    masks, weights = alone[run.split("-")[0]]
    differing = sum(int((found["mask"][name] != mask).sum()) for name, mask in masks.items())
    assert differing <= (2 if "gradual" in run else 0)  # of trained weights that differ by rounding
    for name, expected in weights.items():
        if not differing:
            assert torch.allclose(found["weight"][name], expected, rtol=0, atol=2e-5), name


@pytest.mark.parametrize("stage", RESUMED)
def test_a_resumed_training_is_the_one_that_did_not_stop(runs, stage):
    assert_same(runs[1][f"resumed-{stage}"]["mask"], runs[1][f"gradual-{stage}"]["mask"])
    assert_same(runs[1][f"resumed-{stage}"]["weight"], runs[1][f"gradual-{stage}"]["weight"])


def test_experts_get_the_masks_of_one_process(runs):
    expected = magnitude_masks(tiny_mixture())
    found = runs[1]["mixture-3"]["mask"]
    assert_same({name: found[name] for name in expected}, expected)


def test_a_ticket_is_trained_under_as_it_is(runs):
    assert_same(runs[1]["ticket-2"]["mask"], Ticket.from_pretrained(runs[0] / "ticket").masks())


@pytest.mark.parametrize("run", [*COMPARED, *VARIANTS, "mixture-3", "ticket-2"])
def test_what_is_saved_has_all_masks_and_zeros(runs, run):
    folder, found = runs[0] / run, runs[1][run]
    assert (folder / MASKS_FILE).is_file()
    assert_same(Ticket.from_pretrained(folder).masks(), found["mask"])
    saved = load_file(folder / "model.safetensors")
    for name, mask in found["mask"].items():
        weight = found["weight"][name]
        assert not weight[~mask].any(), name
        full = [key for key in saved if key == name or key.endswith(f".{name}")]
        if full:  # experts are saved one by one
            assert torch.equal(saved[full[0]], weight), name


def searched(folder, config, **options):
    trainer = plain_trainer(folder, config, 4, **STEPS, **options)
    trainer.train()
    return trainer


def test_a_search_finds_the_ticket_of_one_process_and_rewinds_bit_for_bit(runs, tmp_path):
    check_early(runs[0] / "zero3-early", runs[1]["zero3-early"], searched(tmp_path, EARLY, **EVALUATED))


def test_late_rewinding_goes_to_the_step_of_the_dense_round(runs, tmp_path):
    masks = searched(tmp_path, SEARCHED_UNDER_ZERO_2).ticket.masks()
    check_late(runs[0] / "zero2-late", runs[1]["zero2-late"], masks, trained=False)
    check_late(runs[0] / "zero3-late", runs[1]["zero3-late"], None)  # in bf16, from masters in fp32


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_search_is_the_one_that_did_not_stop(runs, stage):
    for kind in ("mask", "weight"):
        assert_same(runs[1][f"zero{stage}-resumed"][kind], runs[1][f"zero{stage}-late"][kind])
