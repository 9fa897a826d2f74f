"""DSEE adapters under DDP, FSDP2, ZeRO-2 and ZeRO-3 come to those of one process."""

import importlib.util

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sparse_hf.algorithms.bits import unpack_bits
from training.dsee_processes import CASES, RESUMED, base_classifier, dsee_trainer
from training.tiny_training import assert_same, tensors
from training.two_processes import found_by_both, run_two


pytestmark = pytest.mark.slow
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
OWN, S1, PLACES = "sparse_hf_dsee_", "sparse_hf_dsee_mask", "sparse_hf_dsee_indices"


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero-2", "zero-3"])
def sharded(request, tmp_path_factory):
    """The folder of the runs, and what both processes came to, by case and "with" or "without" the adapter."""
    if request.param.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    base_classifier().save_pretrained(folder / "base")
    environment = {"STRATEGY": request.param, "BASE": str(folder / "base"), "DS_ACCELERATOR": "cpu"}
    run_two("training.dsee_processes", "run_one_process", folder, **environment)
    return folder, found_by_both(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By case, all tensors of one process."""
    found = {}
    for name, (model, options) in CASES.items():
        training = dsee_trainer(tmp_path_factory.mktemp("alone"), "alone", model, **options())
        training.train()
        found[name] = tensors(training.model)
    return found


def test_adapters_are_those_of_one_process(sharded, alone):
    for case, found in sharded[1].items():
        if "resumed" in case:
            continue
        expected = alone["plain" if case == "loaded" else case]
        assert found["with"].keys() >= expected.keys()
        differing = 0
        for name, one in expected.items():
            if S1 in name and case != "plain":  # by updates, which differ by rounding
                bits = (unpack_bits(mask, (8 * len(one),)) for mask in (one, found["with"][name]))
                differing += int(torch.ne(*bits).sum())
        assert differing <= 4
        for name, one in expected.items():
            if PLACES in name:
                assert torch.equal(found["with"][name], one), (case, name)
            elif S1 not in name and not differing:
                assert torch.allclose(found["with"][name], one, rtol=0, atol=2e-5), (case, name)


def test_the_frozen_weights_are_masked_and_come_back(sharded):
    w0 = tensors(base_classifier())
    for case, found in sharded[1].items():
        masked = 0
        for name, mask in found["with"].items():
            if S1 not in name:
                continue
            frozen = f"{name.partition(f'.{OWN}')[0]}.base_layer.weight"
            original = w0[frozen.removeprefix("base_model.model.").replace(".base_layer", "")]
            kept = unpack_bits(mask, original.shape)
            assert torch.equal(found["with"][frozen], torch.where(kept, original, 0.0)), (case, name)
            assert torch.equal(found["without"][frozen], original), (case, name)
            masked += int((~kept).sum())
        assert (masked > 0) == (case != "moving"), case


def test_a_resumed_training_is_the_one_that_did_not_stop(sharded):
    for case in RESUMED:
        assert_same(sharded[1][f"{case} resumed"]["with"], sharded[1][case]["with"])


def test_what_is_saved_is_the_adapter(sharded):
    folder, runs = sharded
    for case, found in runs.items():
        if "resumed" in case:
            continue
        saved = load_file(folder / case / "adapter_model.safetensors")
        for name, one in saved.items():
            held = [
                key for key in found["with"] if key.replace(".default", "").replace(".modules_to_save", "") == name
            ]
            assert torch.equal(found["with"][held[0]], one), (case, name)
        own = {name for name in found["with"] if OWN in name}
        assert len(own) == sum(OWN in name for name in saved)
        model = PeftModel.from_pretrained(base_classifier(), folder / case)
        read = tensors(model)
        assert all(torch.equal(read[name], found["with"][name]) for name in own), case
