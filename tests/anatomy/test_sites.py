"""Sites on hand-made modules: patterns, parts, routers, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_hf.anatomy import Site, find_sites, named_canonical_parameters
from tiny_models import tiny_model


MIXTRAL = tiny_model("mixtral", "causal_lm")
MIXTRAL_SITES = find_sites(MIXTRAL)


def names(sites):
    return [site.name for site in sites]


def plain_model():
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.first = nn.Linear(4, 3)
    model.norm = nn.LayerNorm(3)
    model.second = nn.Linear(3, 2)
    return model


def test_plain_module_has_its_linear_layers():
    assert find_sites(plain_model()) == [
        Site("first.weight", "first.weight", None, (3, 4), False),
        Site("second.weight", "second.weight", None, (2, 3), False),
    ]


def test_linear_tied_to_an_embedding_is_no_site():
    model = plain_model()
    model.output = nn.Linear(4, 5, bias=False)
    model.output.weight = model.embed.weight
    assert names(find_sites(model)) == ["first.weight", "second.weight"]


def test_shared_module_is_one_site_in_the_place_of_its_first_name():
    model = plain_model()
    model.third = model.first
    assert names(find_sites(model)) == ["first.weight", "second.weight"]


def test_packed_attention_projection_is_a_site():
    model = nn.MultiheadAttention(4, 2)
    assert {site.name: site.shape for site in find_sites(model)} == {
        "in_proj_weight": (12, 4),
        "out_proj.weight": (4, 4),
    }


def test_linear_relative_position_bias_is_no_site():
    model = plain_model()
    model.rel_pos_bias = nn.Linear(4, 2, bias=False)
    assert names(find_sites(model)) == ["first.weight", "second.weight"]


def test_experts_known_to_be_transposed_are_so_in_subclasses_too():
    Llama4TextExperts = type("Llama4TextExperts", (nn.Module,), {})
    for made in (Llama4TextExperts, type("FSDPLlama4TextExperts", (Llama4TextExperts,), {})):
        model = made()
        model.down_proj = nn.Parameter(torch.zeros(1, 6, 4))
        assert find_sites(model) == [Site("down_proj[0]", "down_proj", 0, (4, 6), True)]


def test_linear_gate_is_a_router_beside_experts_only():
    block = nn.Module()
    block.gate = nn.Linear(4, 2)
    block.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model = nn.Module()
    model.moe = block
    model.gate = nn.Linear(4, 4)
    assert names(find_sites(model)) == ["moe.experts.0.weight", "moe.experts.1.weight", "gate.weight"]


def test_routers_are_no_sites_unless_asked_for():
    assert not any(
        ".gate." in name or "shared_expert_gate" in name for name in names(find_sites(tiny_model("qwen2-moe")))
    )
    assert names(find_sites(MIXTRAL, include="*.gate.weight")) == [f"layers.{i}.mlp.gate.weight" for i in range(2)]


def test_include_takes_embeddings_and_heads():
    assert names(find_sites(MIXTRAL, include=["embed_tokens.weight", "lm_head.*"])) == [
        "embed_tokens.weight",
        "lm_head.weight",
    ]


def test_biases_of_experts_are_never_sites():
    chosen = find_sites(tiny_model("gpt-oss"), include="*.mlp.*")
    assert {site.parameter.rsplit(".", 1)[1] for site in chosen} == {"weight", "gate_up_proj", "down_proj"}


def test_brackets_at_the_end_are_an_expert_and_elsewhere_a_set():
    chosen = find_sites(MIXTRAL, include="layers.[01].mlp.experts.down_proj[3]")
    assert names(chosen) == [f"layers.{layer}.mlp.experts.down_proj[3]" for layer in range(2)]
    assert chosen[0].expert == 3
    by_index = find_sites(MIXTRAL, include="layers.0.mlp.experts.down_proj[*]")
    by_parameter = find_sites(MIXTRAL, include="layers.0.mlp.experts.down_proj")
    assert by_index == by_parameter == [site for site in MIXTRAL_SITES if "0.mlp.experts.down" in site.name]


@settings(max_examples=10)
@given(st.sets(st.integers(0, len(MIXTRAL_SITES) - 1), min_size=1, max_size=len(MIXTRAL_SITES) - 1))
def test_names_as_patterns_choose_and_leave_out_exactly_those_sites(chosen):
    patterns = [MIXTRAL_SITES[index].name for index in sorted(chosen, reverse=True)]
    assert find_sites(MIXTRAL, include=patterns) == [MIXTRAL_SITES[index] for index in sorted(chosen)]
    left = [site for index, site in enumerate(MIXTRAL_SITES) if index not in chosen]
    assert find_sites(MIXTRAL, exclude=patterns) == left


def test_exclude_leaves_out_of_what_include_took():
    chosen = find_sites(MIXTRAL, include="layers.0.self_attn.*", exclude=["*.q_proj.*", "*.k_proj.*"])
    assert names(chosen) == ["layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight"]


def test_exclude_may_name_what_is_excluded_anyway_tied_or_not():
    for tie in (True, False):
        model = tiny_model("llama", "causal_lm", tie_word_embeddings=tie)
        assert find_sites(model, exclude="lm_head*") == find_sites(model)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing_lists_near_names(argument):
    with pytest.raises(ValueError, match=rf"`{argument}`.*`firts.weight` matches none.*`first.weight`"):
        find_sites(plain_model(), **{argument: ["second.*", "firts.weight"]})


def test_model_without_sites_says_what_was_looked_for():
    with pytest.raises(ValueError, match="`Embedding` has none .*nn.Linear, Conv1D and experts"):
        find_sites(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="has none"):
        find_sites(plain_model(), exclude="*")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_until_excluded(dtype):
    model = plain_model()
    model.second.weight = nn.Parameter(torch.zeros(2, 3).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="`second.weight` is quantised .*`exclude`"):
        find_sites(model)
    assert names(find_sites(model, exclude="second.*")) == ["first.weight"]


def test_sixteen_bit_weights_are_not_quantised():
    assert names(find_sites(plain_model().to(torch.bfloat16))) == ["first.weight", "second.weight"]


def test_part_is_a_view_of_one_expert_in_any_tensor_of_the_parameters_shape():
    site = Site("experts.down_proj[1]", "experts.down_proj", 1, (2, 4), True)
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    site.part(mask)[0] = False
    assert mask.sum().item() == 22
    assert mask[1, 0].tolist() == [False, False]


@pytest.mark.parametrize("shape", [(3, 2, 4), (4, 2), (1, 4, 2)])
def test_part_refuses_other_shapes(shape):
    site = Site("experts.down_proj[1]", "experts.down_proj", 1, (2, 4), True)
    with pytest.raises(ValueError, match=r"`experts.down_proj\[1\]` .* shape \("):
        site.part(torch.zeros(shape))


def test_sites_of_one_parameter_cover_it_once():
    count = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in named_canonical_parameters(MIXTRAL).items()}
    for site in MIXTRAL_SITES:
        site.part(count[site.parameter]).add_(1)
    covered = {site.parameter for site in MIXTRAL_SITES}
    assert all((tensor == (1 if name in covered else 0)).all() for name, tensor in count.items())


def test_lora_matrices_are_no_sites_and_base_layers_keep_their_names():
    peft = pytest.importorskip("peft")
    model = tiny_model("bert", "sequence_classification")
    sites = find_sites(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    assert find_sites(adapted) == sites
