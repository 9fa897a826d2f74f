"""Two processes that shard a model by FSDP2 come to the masks and zeros of one process."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.ticket import Ticket
from training.tiny_training import AtStep, Crash, CrashAt, assert_same, tiny_classifier, tiny_trainer
from training.two_processes import found_by_both, leave_found, run_two


CASES = {
    "static": StaticSparsityConfig(sparsity=0.6),
    "uniform": StaticSparsityConfig(sparsity=0.6, budget="uniform"),
    "random": StaticSparsityConfig(sparsity=0.6, score="random"),
    "gradient": StaticSparsityConfig(sparsity=0.6, score="gradient", score_batches=2),
    "gradual": GradualPruningConfig(sparsity=0.7, end_step=4, every=2),
    "gradual gradient": GradualPruningConfig(sparsity=0.7, end_step=4, every=2, score="gradient"),
}
EXACT = ("static", "uniform", "random")  # of the first weights, which all ranks know alike
FSDP = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trainer_of(folder: Path, config: object, batch: int, **options: object):
    model = tiny_classifier(hidden_size=20, num_attention_heads=2, **NO_DROPOUT)  # 20 rows: uneven for three ranks
    order = {"train_sampling_strategy": "sequential", "average_tokens_across_devices": False}
    return tiny_trainer(
        folder, config, model=model, per_device_train_batch_size=batch, max_grad_norm=0.5, **order, **options
    )


def pretend_to_be_on_gpus() -> None:
    """accelerate offers FSDP to several GPUs only; what follows runs on CPUs as well."""
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")


def sharded_trainer(folder: Path, config: object, state: str = "FULL_STATE_DICT", batch: int = 2, **options: object):
    pretend_to_be_on_gpus()
    fsdp = {**FSDP, "state_dict_type": state}
    own = {"fsdp": True, "fsdp_config": fsdp, "accelerator_config": {"use_configured_state": True}}
    return trainer_of(folder, config, batch, **own, **options)


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    named = named_canonical_parameters(trainer.model)
    return {name: one.detach().full_tensor().contiguous().clone() for name, one in named.items()}


def run_one_process(folder: str) -> None:
    """What each of the two processes does: every case, and one that is stopped and resumed."""
    found = {}
    for name, config in CASES.items():
        if name == "gradient":  # batches are half as large as those of one process
            config = dataclasses.replace(config, score_batches=4)
        trainer = sharded_trainer(Path(folder) / name, config)
        kinds = set()
        trainer.add_callback(AtStep(lambda model, kinds=kinds, **_: kinds.update(map(type, model.parameters()))))
        trainer.train()
        assert trainer.is_fsdp_enabled
        assert trainer.accelerator.num_processes == 2
        assert all(issubclass(kind, DTensor) for kind in kinds), kinds
        found |= {f"{name}/weight/{key}": one for key, one in whole_weights(trainer).items()}
        found |= {f"{name}/mask/{key}": one for key, one in trainer.ticket.masks().items()}
        trainer.save_model()
    saving = {"save_strategy": "steps", "save_steps": 2, "state": "SHARDED_STATE_DICT"}
    stopped = Path(folder) / "stopped"
    with pytest.raises(Crash):
        sharded_trainer(stopped, CASES["gradual"], callbacks=[CrashAt(3)], **saving).train()
    dist.barrier()
    resumed = sharded_trainer(stopped, CASES["gradual"], **saving)
    resumed.train(resume_from_checkpoint=True)
    found |= {f"resumed/weight/{key}": one for key, one in whole_weights(resumed).items()}
    found |= {f"resumed/mask/{key}": one for key, one in resumed.ticket.masks().items()}
    leave_found(found, Path(folder))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of the run, and by case and kind ("weight", "mask") the whole tensors of its first process."""
    folder = tmp_path_factory.mktemp("fsdp2")
    run_two(__name__, "run_one_process", folder)
    return folder, found_by_both(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_masks_and_weights_are_those_of_one_process(sharded, tmp_path, case):
    _, found = sharded
    alone = trainer_of(tmp_path, CASES[case], 4)
    alone.train()
    masks = alone.ticket.masks()
    weights = {name: one.detach() for name, one in named_canonical_parameters(alone.model).items()}
    if case in EXACT:
        assert_same(found[case]["mask"], masks)
    differing = sum(int((found[case]["mask"][name] != mask).sum()) for name, mask in masks.items())
    assert differing <= 2  # of scores that differ by rounding
    for name, expected in weights.items():
        weight = found[case]["weight"][name]
        if not differing:
            assert torch.allclose(weight, expected, rtol=0, atol=2e-5), name
        if name in masks:
            assert not weight[~found[case]["mask"][name]].any(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_are_all_masks(sharded, case):
    folder, found = sharded
    assert (folder / case / MASKS_FILE).is_file()
    assert_same(Ticket.from_pretrained(folder / case).masks(), found[case]["mask"])


@pytest.mark.slow
def test_a_resumed_training_is_the_one_that_did_not_stop(sharded):
    _, found = sharded
    assert_same(found["resumed"]["mask"], found["gradual"]["mask"])
    assert_same(found["resumed"]["weight"], found["gradual"]["weight"])
