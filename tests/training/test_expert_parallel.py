"""Two processes that hold half of the experts each (Transformers' `DistributedConfig`) come to what one does."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from sparse_hf import BalanceConfig, SparseTrainer, upcycle
from sparse_hf.algorithms.sharded_tensors import local_part, whole_of
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.configs import GradualPruningConfig, StaticSparsityConfig
from sparse_hf.tickets.prune import prune
from sparse_hf.tickets.ticket import Ticket
from tiny_models import tiny_model
from training.tiny_balance import all_losses, mixtral, relative_error, routers_of, rows
from training.tiny_training import AtStep, assert_same, tiny_arguments
from training.two_processes import found_by_both, leave_found, run_two


pytest.importorskip("transformers.distributed.expert_parallel")  # Transformers 5.17 has none
pytestmark = pytest.mark.slow

CASES = {
    "static": StaticSparsityConfig(sparsity=0.6),
    "random": StaticSparsityConfig(sparsity=0.6, score="random", budget="uniform", include=("*.experts.*",)),
    "gradient": StaticSparsityConfig(sparsity=0.6, score="gradient", score_batches=2),
    "gradual": GradualPruningConfig(sparsity=0.7, end_step=4, every=2),
    "ticket": None,  # read from a folder, and its base is checked
}
EXACT = ("static", "random", "ticket")  # of the first weights, which all ranks know alike
LOSSES = {"routers": all_losses("routers"), "network": all_losses("network"), "none": BalanceConfig(0.0)}
RATE = 64.0  # of SGD, so that a step's gradient is not lost in the weights' rounding
TOGETHER = {"experts": {"fsdp_size": 2, "ep_size": 2}, "rows": {"fsdp_size": 2}}  # with or without experts of its own


def load(folder: Path, split: dict[str, int] | None) -> PreTrainedModel:
    """Whole, or what this rank holds of it."""
    config = None if split is None else DistributedConfig(**split)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def trainer_of(folder: Path, case: str, split: dict[str, int] | None, **options: object) -> SparseTrainer:
    """Of the upcycled model in `folder`: six steps of four rows."""
    config = CASES[case]
    arguments = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.5, "save_only_model": True}
    arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1 if split else 2, **options}
    return SparseTrainer(
        load(folder / "moe", split),
        tiny_arguments(folder / case, **arguments),
        train_dataset=rows(),
        sparsity=Ticket.from_pretrained(folder / "ticket") if config is None else config,
    )


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    named = named_canonical_parameters(model)
    return {name: whole_of(local_part(one), one).contiguous().clone() for name, one in named.items()}


def check_zeros(trainer: SparseTrainer) -> None:
    """In this rank's weights and moments, after a step."""
    keeper, named = trainer._sparsity_callback.keeper, named_canonical_parameters(trainer.model)
    for name, mask in keeper.masks().items():
        state = trainer.optimizer.optimizer.state[named[name]]
        for tensor in (named[name], state["exp_avg"], state["exp_avg_sq"]):
            assert not local_part(tensor)[~mask].any(), name
            assert local_part(tensor).any(), name


def gradients(folder: Path, case: str, split: dict[str, int] | None) -> dict[str, torch.Tensor]:
    """Of one step over eight rows, from what it did to the weights; and the balance loss that was logged."""
    model = load(folder / "mixtral", split)
    before = whole_weights(model)
    own = {"optim": "sgd", "max_steps": 1, "learning_rate": RATE, "weight_decay": 0.0, "max_grad_norm": 0.0}
    own |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    own |= {"logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": 2}
    arguments = tiny_arguments(folder / case, per_device_train_batch_size=2 if split else 4, **own)
    trainer = SparseTrainer(model, arguments, train_dataset=rows(), balance=LOSSES[case])
    trainer.train()
    found = {name: (before[name] - one) / RATE for name, one in whole_weights(trainer.model).items()}
    return found | {"logged": torch.tensor([trainer.state.log_history[0]["balance_loss"]])}


def added(folder: Path, split: dict[str, int] | None) -> dict[str, dict[str, torch.Tensor]]:
    """By kind, what all losses together add to each gradient."""
    found = {case: gradients(folder, case, split) for case in LOSSES}
    without = found.pop("none") | {"logged": 0.0}
    return {kind: {name: tensor - without[name] for name, tensor in one.items()} for kind, one in found.items()}


def check_layout(model: PreTrainedModel, split: dict[str, int]) -> None:
    """Experts lie on a mesh of their own, all others on FSDP2's."""
    for name, one in model.named_parameters():
        assert isinstance(one, DTensor), name
        assert one.device_mesh.ndim == (2 if "ep_size" in split and ".experts." in name else 1), name
        assert one.to_local().shape[0] * 2 == one.shape[0], name


def run_one_process(folder: str) -> None:
    """What each of the two processes does."""
    root, found = Path(folder), {}
    for case in CASES:
        split = TOGETHER["experts"]
        trainer = trainer_of(root, case, split, save_strategy="steps", save_steps=6)
        check_layout(trainer.model, split)
        trainer.add_callback(checks := AtStep(lambda trainer=trainer, **_: check_zeros(trainer)))
        trainer.train()
        assert (checks.calls, trainer.accelerator.num_processes) == (6, 2)
        found |= {f"{case}/weight/{name}": one for name, one in whole_weights(trainer.model).items()}
        found |= {f"{case}/mask/{name}": one for name, one in trainer.ticket.masks().items()}
        trainer.save_model()
    with pytest.raises(ValueError, match="`load_best_model_at_end` must be False"):
        trainer_of(root, "static", TOGETHER["experts"], load_best_model_at_end=True).train()
    for name, split in TOGETHER.items():
        for kind, one in added(root, split).items():
            found |= {f"{name}-{kind}/added/{key}": tensor for key, tensor in one.items()}
    leave_found(found, root)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and by case and kind the whole tensors that both processes came to."""
    folder = tmp_path_factory.mktemp("experts")
    tiny_model("mistral", "causal_lm").save_pretrained(folder / "dense")
    upcycle(folder / "dense", folder / "moe", experts=4, check_tokens=0, progress=False)
    mixtral().save_pretrained(folder / "mixtral")
    prune(load(folder / "moe", None), 0.5, score="random").save_pretrained(folder / "ticket")
    run_two(__name__, "run_one_process", folder)
    return folder, found_by_both(folder)


@pytest.mark.parametrize("case", CASES)
def test_masks_and_weights_are_those_of_one_process(found, case):
    folder, masks, weights = found[0], found[1][case]["mask"], found[1][case]["weight"]
    alone = trainer_of(folder, case, None)
    alone.train()
    expected = alone.ticket.masks()
    assert any(".experts." in name for name in masks)
    if case in EXACT:
        assert_same(masks, expected)
    differing = sum(int((masks[name] != mask).sum()) for name, mask in expected.items())
    assert differing <= 2  # of scores that differ by rounding
    for name, one in whole_weights(alone.model).items():
        if not differing:
            assert torch.allclose(weights[name], one, rtol=0, atol=2e-5), name
        if name in masks:
            assert not weights[name][~masks[name]].any(), name


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_whole_and_loaded_by_one_process(found, case):
    folder, expected = found
    for saved in (folder / case, folder / case / "checkpoint-6"):
        assert (saved / MASKS_FILE).is_file()
        assert_same(Ticket.from_pretrained(saved).masks(), expected[case]["mask"])
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert_same(whole_weights(model), expected[case]["weight"])


@pytest.mark.parametrize("split", TOGETHER)
def test_what_the_balance_loss_adds_is_that_of_one_process(found, split):
    folder, by_case = found
    for kind, expected in added(folder, None).items():
        one = by_case[f"{split}-{kind}"]["added"]
        assert torch.allclose(one.pop("logged"), expected.pop("logged"), rtol=1e-5), kind
        assert relative_error(routers_of(one), routers_of(expected)) < 1e-5, kind
        large = {name: tensor for name, tensor in expected.items() if tensor.norm() > 1e-3}
        assert len(large) == 2 if kind == "routers" else len(large) > 10
        assert relative_error({name: one[name] for name in large}, large) < 1e-4, kind
