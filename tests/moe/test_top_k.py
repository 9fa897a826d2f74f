"""The number of experts per token of a model in memory: read, changed, saved, and refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe.every_family import STOCK_FAMILIES, every_family
from sparse_hf import get_top_k, set_top_k
from sparse_hf.moe.expert_calls import expert_calls, experts_by_block
from sparse_hf.moe.modeling_mixture import FEED_FORWARDS, MODEL_TYPE
from sparse_hf.moe.router_logits import EXPERT_COUNTS
from sparse_hf.moe.top_k import HOLDERS, largest_top_k, top_k_of
from tiny_mixtures import convert, tiny_dense
from tiny_models import tiny_inputs, tiny_model


IDS = torch.arange(3, 11).reshape(2, 4)


def used(model, inputs=None):
    """Experts per token, as the experts are called."""
    calls = expert_calls(model, experts_by_block(model), inputs or {"input_ids": IDS})
    assert len(calls) == 2
    (k,) = {call.chosen.shape[1] for call in calls.values()}
    return k


def test_the_table_knows_every_family():
    assert HOLDERS.keys() == EXPERT_COUNTS.keys()


@pytest.mark.parametrize("model_type", [one for one in STOCK_FAMILIES if one != "phimoe"])
def test_stock_families(tmp_path, model_type):
    """What is said, what is done, and what a saved model is loaded with."""
    model = every_family(model_type)
    assert get_top_k(model) == used(model) == 2
    for k in (1, 4, 3):
        set_top_k(model, k)
        assert get_top_k(model) == used(model) == k
    model.config.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert get_top_k(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))) == 3
    for module in model.modules():  # nothing is left behind: the heads' own balance losses count with it too
        assert vars(module).get("top_k", 3) == vars(module).get("num_experts_per_tok", 3) == 3


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_mixtures_of_ours(tmp_path, family):
    assert HOLDERS[f"{MODEL_TYPE}{family}"] == ("block",)
    assert family in FEED_FORWARDS
    tiny_dense(f"{family}-base").save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", check_tokens=0)
    model = AutoModel.from_pretrained(tmp_path / "moe").eval()
    set_top_k(model, 3)
    assert used(model, tiny_inputs(model)) == 3
    model.save_pretrained(tmp_path / "saved")
    assert get_top_k(AutoModel.from_pretrained(tmp_path / "saved")) == 3


def test_all_experts_are_the_full_mixture():
    """With k = all, a Mixtral layer is the sum of all experts, weighted by the whole softmax."""
    model = every_family("mixtral")
    block = model.model.layers[0].mlp
    set_top_k(model, 4)
    hidden = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = (hidden[0] @ block.gate.weight.T).softmax(-1)
        expected = 0
        for expert in range(4):
            gate, up = (hidden[0] @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            made = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T
            expected = expected + weights[:, expert, None] * made
        assert torch.allclose(block(hidden)[0], expected, atol=1e-6)


def test_routers_that_peft_wraps():
    model = get_peft_model(every_family("qwen3_moe"), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    set_top_k(model, 3)
    assert get_top_k(model) == used(model.eval()) == 3


@pytest.mark.parametrize("k", [0, 5, 2.0, True, None])
def test_refused_numbers(k):
    model = every_family("mixtral")
    with pytest.raises(ValueError, match=r"`k` of this mixtral model must be 1 to 4, got"):
        set_top_k(model, k)
    assert get_top_k(model) == model.config.num_experts_per_tok == 2


@pytest.mark.parametrize("model_type", ["glm4_moe", "dots1", "deepseek_v3", "deepseek_v2"])
def test_groups_of_experts_limit_it(model_type):
    """One of two groups of two experts is chosen: a third expert would be one that the group mask excludes."""
    model = every_family(model_type, n_group=2, topk_group=1, topk_method="group_limited_greedy")
    assert largest_top_k(model) == 2
    with pytest.raises(ValueError, match="must be 1 to 2, got 3"):
        set_top_k(model, 3)
    set_top_k(model, 1)
    assert used(model) == 1


def test_greedy_deepseek_is_not_limited():
    assert largest_top_k(every_family("deepseek_v2", n_group=2, topk_group=1, topk_method="greedy")) == 4


def test_phimoe_takes_two_whatever_it_is_told():
    model = every_family("phimoe")
    assert used(model) == 2
    model.model.layers[0].mlp.router.top_k = 1
    assert used(model) == 2
    model = every_family("phimoe")
    set_top_k(model, 2)
    with pytest.raises(ValueError, match="phimoe model must be 2, which its routers are made for, got 1"):
        set_top_k(model, 1)


def test_layers_that_differ_and_dense_models():
    model = every_family("mixtral")
    model.model.layers[1].mlp.gate.top_k = 3
    with pytest.raises(ValueError, match=r"All layers must have the same number .* got \[2, 3\]"):
        get_top_k(model)
    set_top_k(model, 2)
    assert get_top_k(model) == 2
    del model.model.layers[1].mlp.gate.top_k
    with pytest.raises(ValueError, match=r"must have a `top_k`, but `model.layers.1.mlp` has none"):
        set_top_k(model, 1)
    with pytest.raises(ValueError, match="got a model of type 'llama'"):
        get_top_k(tiny_model("llama", "causal_lm"))


def test_it_comes_back_after_an_error():
    model, seen = every_family("mixtral"), []

    def fail():
        with top_k_of(model, 4):
            seen.append(used(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [4]
    assert used(model) == get_top_k(model) == 2
