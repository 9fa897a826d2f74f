"""A mixture of identical experts in the memory of the dense model: what it computes, takes and refuses."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sparse_hf.moe.keep_shared import is_shared
from sparse_hf.moe.memory_names import memory_name
from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.shared_storage import expert_lora_targets, load_with_shared_experts
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense


ALL = [(source, pair.target.model_type) for source, pairs in PAIRS.items() for pair in pairs]
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
OPTIONS = {"experts": 4, "top_k": 2, "router_std": 0.5, "seed": 3}


def stored_bytes(model):
    """Of parameters, each storage counted once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shared(model):
    return [name for name, parameter in model.named_parameters() if is_shared(parameter)]


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **{**expert_lora_targets(model), **options}))


@pytest.fixture
def dense(tmp_path):
    save_dense(tmp_path / "dense", "qwen3")
    return tmp_path / "dense"


@pytest.fixture
def model(dense):
    return load_with_shared_experts(dense, **OPTIONS)


@pytest.mark.parametrize(("family", "target"), ALL)
def test_it_is_the_mixture_that_upcycle_writes(tmp_path, family, target):
    """Every weight bit for bit, routers too; and the logits, however Transformers runs experts."""
    save_dense(tmp_path / "dense", family)
    upcycle(tmp_path / "dense", tmp_path / "moe", target=target, check_tokens=0, progress=False, **OPTIONS)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model = load_with_shared_experts(tmp_path / "dense", target=target, **OPTIONS)
    assert type(model) is type(written)
    ours, theirs = model.state_dict(), written.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert len(shared(model)) == 4
    expected = logits(written)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("granite", "granitemoe")]
)
def test_memory_is_that_of_the_dense_model(tmp_path, family, target):
    dense = stored_bytes(save_dense(tmp_path / "dense", family))
    model = load_with_shared_experts(tmp_path / "dense", target=target, experts=64)
    routers = 2 * 64 * 32 * 4
    assert stored_bytes(model) <= 1.02 * dense + routers
    trained = adapted(model)
    adapter = sum(4 * p.numel() for p in trained.parameters() if p.requires_grad)  # of which routers, copied
    assert stored_bytes(trained) <= 1.02 * dense + routers + adapter
    upcycle(tmp_path / "dense", tmp_path / "moe", target=target, experts=64, check_tokens=0, progress=False)
    assert stored_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")) > 20 * dense  # the count sees copies


def test_some_layers_stay_dense(dense):
    model = load_with_shared_experts(dense, **OPTIONS, layers=[1])
    assert {name.split(".")[2] for name in shared(model)} == {"1"}
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(dense))).abs().max() < 1e-5


def test_dtypes(tmp_path):
    save_dense(tmp_path / "dense", "llama", torch.bfloat16)
    model = load_with_shared_experts(tmp_path / "dense", target="glm4_moe", **OPTIONS)
    biases = {b.dtype for name, b in model.named_buffers() if "e_score_correction_bias" in name}
    assert ({p.dtype for p in model.parameters()}, biases) == ({torch.bfloat16}, {torch.float32})
    wider = load_with_shared_experts(tmp_path / "dense", target="glm4_moe", dtype=torch.float32, **OPTIONS)
    assert {p.dtype for p in wider.parameters()} == {torch.float32}


def test_moving_keeps_experts_shared(model):
    before, expected = stored_bytes(model), logits(model)
    assert stored_bytes(model.double()) == 2 * before
    assert stored_bytes(model.to("cpu", torch.bfloat16)) == before // 2
    assert len(shared(model)) == 4
    assert torch.allclose(logits(model.float()), expected, atol=0.05 * expected.abs().max())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in shared(model))
    order = [name for name, _ in model.model.layers[0].mlp.experts.named_parameters()]
    assert order == ["gate_up_proj", "down_proj"]


def test_a_deep_copy_is_real(model):
    twin = copy.deepcopy(model)
    assert not shared(twin)
    assert torch.equal(logits(twin), logits(model))
    twin.double()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_by_stock_trainer(model, tmp_path, checkpointing):
    model.config.output_router_logits = True
    trained = adapted(model)
    before, untrained = stored_bytes(trained), {name: p.detach().clone() for name, p in trained.named_parameters()}
    data = [{"input_ids": one, "labels": one} for one in torch.randint(3, 96, (16, 12))]
    args = TrainingArguments(
        tmp_path / "run",
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=trained, args=args, train_dataset=data).train()
    assert stored_bytes(trained) == before
    assert len(shared(trained)) == 4
    changed = {name for name, p in trained.named_parameters() if not torch.equal(p, untrained[name])}
    assert changed == {name for name, p in trained.named_parameters() if p.requires_grad}
    assert {name.rpartition("lora_")[2] for name in changed if "lora_" in name} >= {"A.default.weight"}
    assert any("mlp.gate" in name for name in changed)
    again = load_with_shared_experts(tmp_path / "dense", **OPTIONS)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(trained.eval()))


def test_checkpointing_holds_the_experts_of_no_layer(model):
    def held_bytes():
        """Of what autograd keeps between forward and backward pass."""
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trained(input_ids=IDS, labels=IDS)
        return sum(found.values())

    trained = adapted(model).train()
    experts = 2 * 4 * 3 * 64 * 32 * 4  # layers, experts, matrices, neurons, hidden, bytes
    assert held_bytes() > experts
    trained.gradient_checkpointing_enable()
    assert held_bytes() < experts / 4


def test_what_would_lose_the_sharing_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="a copy per expert.*`export_merged`"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained = adapted(model)
    with pytest.raises(RuntimeError, match="single memory location"):
        trained.merge_and_unload()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="_proj` requires a gradient"):
        trained(input_ids=IDS)


def test_real_copies_are_saved(dense, tmp_path):
    trained = adapted(load_with_shared_experts(dense, **OPTIONS))
    expected = logits(trained)
    merged = trained.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_ddp_is_told_every_shared_parameter(model):
    plain = shared(model)
    wrapped = shared(adapted(model, target_parameters=["mlp.experts.gate_up_proj"], modules_to_save=None))
    assert {*plain, *wrapped} <= set(model._ddp_params_and_buffers_to_ignore)
    assert not {name for name, p in model.named_parameters() if p.requires_grad} & set(
        model._ddp_params_and_buffers_to_ignore
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"), "1 are missing: model.layers.0.self"),
        (lambda weights: weights.update({"model.layers.0.extra": torch.ones(1)}), "none for `model.layers.0.extra`"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(32).to(torch.int8)}), "got I8"),
    ],
)
def test_a_checkpoint_of_something_else(dense, change, match):
    weights = load_file(dense / "model.safetensors")
    change(weights)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load_with_shared_experts(dense, **OPTIONS)


def test_targets_need_the_model(dense):
    with pytest.raises(ValueError, match="`load_with_shared_experts` is needed, got a Qwen3ForCausalLM"):
        expert_lora_targets(AutoModelForCausalLM.from_pretrained(dense))


def test_names_in_memory():
    assert memory_name("model.layers.3.block_sparse_moe.gate.weight") == "model.layers.3.mlp.gate.weight"
    assert memory_name("model.layers.3.self_attn.q_proj.weight") == "model.layers.3.self_attn.q_proj.weight"
