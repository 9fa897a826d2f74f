"""The bias of the choice: where families have it, what it changes, and that it is kept."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from moe.test_router_logits import DEEPSEEK, SMALL, stock
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.router_logits import RouterReader
from sparse_hf.moe.selection_bias import hold_in_float32, move_selection_biases, selection_biases
from tiny_mixtures import VARIANTS, convert, tiny_dense
from tiny_models import tiny_inputs


SPARSE = dict(SMALL, moe_intermediate_size=16, first_k_dense_replace=0, n_group=1, topk_group=1)
LFM = dict(SMALL, num_experts=4, moe_intermediate_size=16, num_dense_layers=0, layer_types=["full_attention"] * 2)
WITH_BIAS = {
    "deepseek_v3": dict(DEEPSEEK, n_shared_experts=1),
    "glm4_moe": dict(SPARSE, n_routed_experts=4, n_shared_experts=1),
    "dots1": dict(SPARSE, n_routed_experts=4, n_shared_experts=1),
    "ernie4_5_moe": dict(SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0),
    "lfm2_moe": LFM,
}
FAMILIES = pytest.mark.parametrize("family", WITH_BIAS)


def biased(family, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**WITH_BIAS[family], **changes})
        return AutoModelForCausalLM.from_config(config)


def biases_of(model):
    reader = RouterReader(model)
    reader.detach()
    return selection_biases(model, [model.get_submodule(name) for name in reader.names])


def read(model):
    """Routings, and the weights that the experts were called with."""
    reader, weights = RouterReader(model), []
    hooks = [
        model.get_submodule(name).experts.register_forward_pre_hook(lambda _, passed: weights.append(passed[2]))
        for name in reader.names
    ]
    with reader.listening() as routings, torch.no_grad():
        model(**tiny_inputs(model))
    for hook in (reader, *hooks):
        hook.detach() if hook is reader else hook.remove()
    return routings, weights


@FAMILIES
def test_it_changes_the_choice_and_not_the_weights(family):
    model = biased(family, norm_topk_prob=False)
    for weight, _ in RouterReader(model).linear_routers():  # Ernie's are zeros in 5.17
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    bias, last = biases_of(model)
    assert bias.numel() == 4
    assert bias.dtype == torch.float32
    (before, _), (plain, _) = read(model)
    wanted = before.chosen[0]  # of the first token, from now on of all
    for one in (bias, last):
        one.view(-1)[wanted] += 50
    (after, other), (weights, _) = read(model)
    assert set(after.chosen.unique().tolist()) == set(other.chosen.unique().tolist()) == set(wanted.tolist())
    assert torch.equal(before.logits, after.logits)
    same = (before.chosen.sort().values == after.chosen.sort().values).all(1)
    assert same.any()
    assert not same.all()
    assert torch.allclose(plain[same].sort().values, weights[same].sort().values)


@FAMILIES
def test_it_is_saved_and_comes_back_in_float32(tmp_path, family):
    model = biased(family).bfloat16()
    biases = biases_of(model)
    hold_in_float32(biases)
    move_selection_biases(biases, torch.tensor([[4, 0, 2, 2], [0, 1, 2, 3]]), 0.001)
    expected = [[-0.001, 0.001, 0, 0], [0.001, 0.001, -0.001, -0.001]]
    assert [one.flatten().tolist() for one in biases] == [pytest.approx(one) for one in expected]
    assert biases[0] is biases_of(model)[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(biases, biases_of(loaded), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["gpt2", "bert"])
def test_mixtures_of_ours(tmp_path, variant):
    tiny_dense(variant).save_pretrained(tmp_path / "dense")
    for has_bias in (True, False):
        convert(tmp_path / "dense", tmp_path / str(has_bias), check_tokens=0, router=RouterConfig(bias=has_bias))
    load = getattr(transformers, VARIANTS[variant][3]).from_pretrained
    model = load(tmp_path / "True")
    biases = biases_of(model)
    biases[0] += torch.tensor([-50.0, 50, -50, 50])
    routings, _ = read(model)
    assert set(routings[0].chosen.unique().tolist()) == {1, 3}
    with pytest.raises(ValueError, match=f"got sparse_hf_mixture_{variant} without it"):
        biases_of(load(tmp_path / "False"))


def test_models_without_it_are_refused():
    with pytest.raises(ValueError, match=r"`bias_rate` needs routers with a bias.*glm4_moe.*got mixtral\. Upcycle to"):
        biases_of(stock("mixtral"))
    with pytest.raises(ValueError, match="got lfm2_moe without it"):
        biases_of(biased("lfm2_moe", use_expert_bias=False))


def test_the_optimizer_does_not_get_it():
    model = biased("ernie4_5_moe").requires_grad_(True)
    biases = biases_of(model)
    trained = {id(one) for one in model.parameters() if one.requires_grad}
    assert trained
    assert not trained & {id(one) for one in biases}


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe"])
def test_adapters(tmp_path, family):
    def adapted(**changes):
        return get_peft_model(biased(family), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **changes))

    with pytest.raises(ValueError, match="got `e_score_correction_bias` outside"):
        biases_of(adapted())
    model = adapted(modules_to_save=["gate"])
    biases = biases_of(model)
    biases[0] += 1
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_config(model.config)
    loaded = get_peft_model(saved, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(biases_of(loaded)[0], biases[0])
