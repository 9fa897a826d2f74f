"""Mixtures of ours with other routers: written, loaded, trained."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sparse_hf import RouterConfig
from sparse_hf.moe.modeling_mixture import MixtureBlock
from tiny_mixtures import VARIANTS, convert, tiny_dense
from tiny_models import tiny_inputs


KINDS = {
    "biased": ("gpt2", RouterConfig(bias=True, capacity_factor=1.0), 2),
    "cosine": ("vit", RouterConfig("cosine", bias=True), 2),
    "cosine-causal": ("gpt2", RouterConfig("cosine", size=3, capacity_factor=1.25), 1),
    "all": ("bert", RouterConfig("expert_choice", capacity_factor=4.0), 2),
    "all-t5": ("t5-tokens", RouterConfig("expert_choice", capacity_factor=4), 2),
    "hash": ("gpt2", RouterConfig("hash"), 1),
    "hash-roberta": ("roberta", RouterConfig("hash"), 1),
}


def make(folder, variant, router, top_k=2, apart=False, **options):
    """The dense model and the mixture as it is loaded; `apart` makes its experts differ."""
    dense = tiny_dense(variant)
    dense.save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "moe", router=router, top_k=top_k)
    mixture = getattr(transformers, VARIANTS[variant][3]).from_pretrained(folder / "moe", **options)
    if apart:
        with torch.no_grad():
            for block in blocks(mixture):
                block.experts.down_proj.mul_(torch.arange(1, 5)[:, None, None])
    return dense, mixture


def blocks(model):
    return [module for module in model.modules() if isinstance(module, MixtureBlock)]


def padded_inputs(model):
    inputs = tiny_inputs(model, batch=3)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, -3:] = 0
    return inputs


@torch.no_grad()
def outputs(model, inputs):
    return model(**inputs)[0]


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_kept_and_saving_changes_nothing(tmp_path, kind):
    variant, router, top_k = KINDS[kind]
    dense, mixture = make(tmp_path, variant, router, top_k)
    inputs = padded_inputs(dense)
    real = inputs.get("attention_mask", torch.ones(())).bool()
    found, expected = outputs(mixture, inputs), outputs(dense, inputs)
    if found.shape[:2] == real.shape:  # what is computed for padding is nobody's business
        found, expected = found[real], expected[real]
    assert_close(found, expected)
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = copy.deepcopy(type(mixture).from_pretrained(tmp_path / "again"))
    assert torch.equal(outputs(again, inputs), outputs(mixture, inputs))
    for name, value in router.entries().items():
        assert getattr(again.config, name) == value


@pytest.mark.parametrize("kind", ["biased", "cosine", "hash"])
def test_routers_and_biases_stay_in_float32(tmp_path, kind):
    variant, router, top_k = KINDS[kind]
    _, mixture = make(tmp_path, variant, router, top_k, dtype=torch.bfloat16)
    for block in blocks(mixture):
        assert block.experts.down_proj.dtype == torch.bfloat16
        tensors = [*block.router.parameters(), *block.router.buffers()]
        assert {one.dtype for one in tensors} == {torch.int16 if kind == "hash" else torch.float32}


@pytest.mark.parametrize("kind", ["biased", "cosine", "all", "all-t5", "hash-roberta"])
def test_gradients_reach_all_that_is_trained(tmp_path, kind):
    variant, router, top_k = KINDS[kind]
    dense, mixture = make(tmp_path, variant, router, top_k, apart=True)
    mixture.train()
    mixture(**tiny_inputs(dense, batch=4))[0].square().mean().backward()
    for block in blocks(mixture):
        trained = dict(block.router.named_parameters())
        assert ("selection_bias" in dict(block.router.named_buffers())) == router.bias
        assert len(trained) == {"top_k": 1, "cosine": 3, "expert_choice": 1, "hash": 0}[router.kind]
        assert all(one.grad.abs().max() > 0 for one in trained.values())


def test_a_selection_bias_is_saved_and_moves_the_choice(tmp_path):
    _, mixture = make(tmp_path, "gpt2", RouterConfig(bias=True), 1)
    chosen = []
    for block in blocks(mixture):
        assert not block.router.selection_bias.any()
        block.router.selection_bias[2] = 1e3
        block.experts.register_forward_pre_hook(lambda _, arguments: chosen.append(arguments[1]))
    inputs = tiny_inputs(mixture)
    outputs(mixture, inputs)
    assert all((one == 2).all() for one in chosen)
    mixture.save_pretrained(tmp_path / "again")
    again = type(mixture).from_pretrained(tmp_path / "again")
    assert torch.equal(blocks(again)[1].router.selection_bias, torch.tensor([0.0, 0.0, 1e3, 0.0]))
    assert torch.equal(outputs(again, inputs), outputs(mixture, inputs))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("normalised", [True, False])
def test_expert_choice_by_the_definition(tmp_path, implementation, normalised):
    """Token by token: the experts that took it, weighted by its probabilities; nothing where none did."""
    router = RouterConfig("expert_choice", capacity_factor=0.75, norm_topk_prob=normalised)
    _, mixture = make(tmp_path, "bert", router, apart=True)
    mixture.set_experts_implementation(implementation)
    seen, block = [], blocks(mixture)[0]
    block.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output)))
    inputs = padded_inputs(mixture)
    outputs(mixture, inputs)
    ((hidden, output),) = seen
    alone = 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        tokens = hidden[row, mask]
        scores = block.router(tokens).softmax(-1)
        places = -(-3 * len(tokens) // 16)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        for expert in range(4):
            taken[scores[:, expert].topk(places).indices, expert] = True
        alone += int((~taken.any(-1)).sum())
        weights = scores * taken
        if normalised:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
        every = torch.arange(4).expand(len(tokens), 4).contiguous()
        expected = block.experts(tokens, every, weights)
        assert torch.allclose(output[row, mask], expected, atol=1e-4)
        assert not output[row, ~mask].any()
    assert alone > 0
    assert block.dropped_fraction.item() == pytest.approx(alone / int(inputs["attention_mask"].sum()))


@pytest.mark.parametrize("variant", ["bert", "t5-tokens"])
def test_expert_choice_depends_on_neither_padding_nor_the_batch(tmp_path, variant):
    _, mixture = make(tmp_path, variant, RouterConfig("expert_choice", capacity_factor=1.0), apart=True)
    inputs = padded_inputs(mixture)
    together = outputs(mixture, inputs)
    alone = outputs(mixture, {"input_ids": inputs["input_ids"][1:2, :-3]})
    assert_close(together[1:2, :-3], alone)


def test_full_experts_drop_in_training_only(tmp_path):
    dense, mixture = make(tmp_path, "gpt2", RouterConfig(capacity_factor=0.5), 1)
    inputs = padded_inputs(dense)
    assert_close(outputs(mixture, inputs), outputs(dense, inputs))
    block = blocks(mixture)[0]
    assert block.dropped_fraction is None
    kept = []
    block.experts.register_forward_hook(lambda _, arguments, output: kept.append((arguments, output)))
    mixture.train()
    mixture(**inputs)
    (((_, experts, weights), output),) = kept
    real = inputs["attention_mask"].bool().reshape(-1)
    lost = (weights[:, 0] == 0) & real
    assert not output[lost].any()
    assert not output[~real].any()
    assert output[(weights[:, 0] > 0)].abs().sum(-1).min() > 0
    assert torch.bincount(experts[weights > 0]).max() <= -(-int(real.sum()) // 8)
    assert not block.dropped_fraction.requires_grad
    assert block.dropped_fraction.item() == pytest.approx(lost.sum().item() / real.sum().item())


@pytest.mark.parametrize("cached", [True, False])
def test_hashed_gpt2_generates_the_same(tmp_path, cached):
    dense, mixture = make(tmp_path, "gpt2", RouterConfig("hash"), 1)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached}
    inputs = tiny_inputs(dense)
    assert torch.equal(mixture.generate(**inputs, **options), dense.generate(**inputs, **options))


@pytest.mark.parametrize("kind", ["biased", "all", "hash"])
def test_recomputation_knows_the_batch_of_its_forward_pass(tmp_path, kind):
    variant, router, top_k = KINDS[kind]
    router = RouterConfig("expert_choice", capacity_factor=1.0) if kind == "all" else router
    _, mixture = make(tmp_path, variant, router, top_k, apart=True)
    for module in mixture.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first, second = padded_inputs(mixture), padded_inputs(mixture)
    second["input_ids"] = second["input_ids"].flip(0)
    second["attention_mask"][2, 2:] = 0
    gradients = []
    for checkpointing in (False, True):
        mixture.train().zero_grad()
        if checkpointing:
            mixture.gradient_checkpointing_enable()
        # Both forward passes come before both recomputations.
        (mixture(**first)[0].square().mean() + mixture(**second)[0].square().mean()).backward()
        gradients.append({name: one.grad.clone() for name, one in mixture.named_parameters() if one.grad is not None})
    before, after = gradients
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-7) for name in before)


def test_a_larger_vocabulary_is_hashed_and_loads_again(tmp_path):
    _, mixture = make(tmp_path, "gpt2", RouterConfig("hash"), 1)
    size = mixture.config.vocab_size
    mixture.resize_token_embeddings(size + 5)
    mixture.save_pretrained(tmp_path / "again")
    again = type(mixture).from_pretrained(tmp_path / "again")
    inputs = {"input_ids": torch.tensor([[1, size + 4, 2]])}
    assert torch.equal(outputs(again, inputs), outputs(mixture, inputs))
