"""Which matrices of each family are sites: their names and shapes against the architecture, written out by hand."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from sparse_hf.anatomy import canonical_names, find_sites, named_canonical_parameters
from tiny_models import CONFIGS, tiny_inputs, tiny_model


# Width, MLP width, width of two key-value heads, and of the experts of Qwen-MoE (its shared expert: 24).
D, F, KV, X = 32, 64, 16, 16
E = 4


def numbered(layers, matrices, template="layers.{}."):
    """The matrices of one layer for layers 0 and 1 of the stack that `template` names."""
    return {
        f"{template.format(layer)}{name}.weight": shape for layer in range(layers) for name, shape in matrices.items()
    }


def experts(name, shape):
    return {f"layers.{layer}.mlp.experts.{name}[{expert}]": shape for layer in range(2) for expert in range(E)}


LLAMA_ATTENTION = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (KV, D),
    "self_attn.v_proj": (KV, D),
    "self_attn.o_proj": (D, D),
}
LLAMA = LLAMA_ATTENTION | {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
BERT = numbered(
    2,
    {
        "attention.self.query": (D, D),
        "attention.self.key": (D, D),
        "attention.self.value": (D, D),
        "attention.output.dense": (D, D),
        "intermediate.dense": (F, D),
        "output.dense": (D, F),
    },
    "encoder.layer.{}.",
)
POOLER = {"pooler.dense.weight": (D, D)}
T5_ATTENTION = dict.fromkeys("qkvo", (D, D))
T5_FEED_FORWARD = {"DenseReluDense.wi": (F, D), "DenseReluDense.wo": (D, F)}
T5_ENCODER = {f"layer.0.SelfAttention.{name}": shape for name, shape in T5_ATTENTION.items()} | {
    f"layer.1.{name}": shape for name, shape in T5_FEED_FORWARD.items()
}
T5_DECODER = (
    {f"layer.0.SelfAttention.{name}": shape for name, shape in T5_ATTENTION.items()}
    | {f"layer.1.EncDecAttention.{name}": shape for name, shape in T5_ATTENTION.items()}
    | {f"layer.2.{name}": shape for name, shape in T5_FEED_FORWARD.items()}
)

# family -> the sites of its base model: name -> (out_features, in_features)
EXPECTED = {
    "bert": BERT | POOLER,
    "roberta": BERT | POOLER,
    "distilbert": numbered(
        2,
        {f"attention.{name}_lin": (D, D) for name in ("q", "k", "v", "out")}
        | {"ffn.lin1": (F, D), "ffn.lin2": (D, F)},
        "transformer.layer.{}.",
    ),
    "deberta-v2": numbered(
        2,
        {f"attention.self.{name}_proj": (D, D) for name in ("query", "key", "value", "pos_key", "pos_query")}
        | {"attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)},
        "encoder.layer.{}.",
    ),
    "vit": numbered(
        2,
        {f"attention.{name}_proj": (D, D) for name in "qkvo"} | {"mlp.fc1": (F, D), "mlp.fc2": (D, F)},
    )
    | POOLER,
    "gpt2": numbered(
        2,
        {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)},
        "h.{}.",
    ),
    "gpt-neox": numbered(
        2,
        {
            "attention.query_key_value": (3 * D, D),
            "attention.dense": (D, D),
            "mlp.dense_h_to_4h": (F, D),
            "mlp.dense_4h_to_h": (D, F),
        },
    ),
    "opt": {"decoder.project_in.weight": (D, 16), "decoder.project_out.weight": (16, D)}
    | numbered(
        2,
        {f"self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")} | {"fc1": (F, D), "fc2": (D, F)},
        "decoder.layers.{}.",
    ),
    "llama": numbered(2, LLAMA),
    "mistral": numbered(2, LLAMA),
    "qwen2": numbered(2, LLAMA),
    "qwen3": numbered(2, LLAMA),
    "gemma": numbered(2, LLAMA),
    "phi3": numbered(
        2,
        {
            "self_attn.qkv_proj": (D + 2 * KV, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_up_proj": (2 * F, D),
            "mlp.down_proj": (D, F),
        },
    ),
    "t5": numbered(2, T5_ENCODER, "encoder.block.{}.") | numbered(2, T5_DECODER, "decoder.block.{}."),
    "mixtral": numbered(2, LLAMA_ATTENTION) | experts("gate_up_proj", (2 * F, D)) | experts("down_proj", (D, F)),
    "qwen2-moe": numbered(
        2,
        LLAMA_ATTENTION
        | {f"mlp.shared_expert.{name}_proj": (24, D) for name in ("gate", "up")}
        | {"mlp.shared_expert.down_proj": (D, 24)},
    )
    | experts("gate_up_proj", (2 * X, D))
    | experts("down_proj", (D, X)),
    "qwen3-moe": numbered(2, LLAMA_ATTENTION) | experts("gate_up_proj", (2 * X, D)) | experts("down_proj", (D, X)),
    "gpt-oss": numbered(2, LLAMA_ATTENTION) | experts("gate_up_proj", (2 * F, D)) | experts("down_proj", (D, F)),
}
# Heads other than `causal_lm` to put on the base model; of these, two leave out its pooler.
HEADS = {
    "bert": "sequence_classification",
    "roberta": "masked_lm",
    "distilbert": "token_classification",
    "deberta-v2": "sequence_classification",
    "vit": "image_classification",
    "t5": "seq2seq_lm",
}
POOLER_DROPPED = ("roberta", "vit")


def test_expected_covers_every_tiny_family():
    assert set(EXPECTED) == set(CONFIGS)


@pytest.mark.parametrize("family", EXPECTED)
def test_sites_of_the_base_model(family):
    assert {site.name: site.shape for site in find_sites(tiny_model(family))} == EXPECTED[family]


@pytest.mark.parametrize("family", EXPECTED)
def test_sites_do_not_depend_on_the_head(family):
    dropped = {"pooler.dense.weight"} if family in POOLER_DROPPED else set()
    bare = [site for site in find_sites(tiny_model(family)) if site.name not in dropped]
    assert find_sites(tiny_model(family, HEADS.get(family, "causal_lm"))) == bare


@pytest.mark.parametrize("family", EXPECTED)
def test_only_transposed_storage_is_called_transposed(family):
    model = tiny_model(family)
    parameters = named_canonical_parameters(model)
    for site in find_sites(model):
        stored = site.shape[::-1] if site.transposed else site.shape
        assert tuple(site.part(parameters[site.parameter]).shape) == stored
        expected = family == "gpt2" or (family == "gpt-oss" and site.expert is not None)
        assert site.transposed == expected, site.name


@pytest.mark.parametrize("family", EXPECTED)
def test_edits_through_part_reach_the_model_and_nothing_else(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites, parameters = find_sites(model), named_canonical_parameters(model)
    with torch.no_grad():
        output = model(**inputs)[0]
        for site in sites:
            site.part(parameters[site.parameter]).zero_()
        assert not torch.equal(model(**inputs)[0], output)
    after = model.state_dict()
    stored = {site.parameter for site in sites}
    zeroed = {full for full, canonical in canonical_names(model).items() if canonical in stored}
    for name, tensor in after.items():
        assert (not tensor.any()) if name in zeroed else torch.equal(tensor, before[name]), name


def test_t5_encoder_alone_has_the_encoder_sites_of_the_whole():
    alone = find_sites(tiny_model("t5", "T5EncoderModel"))
    assert alone == [site for site in find_sites(tiny_model("t5")) if site.name.startswith("encoder.")]
    assert {site.name for site in alone} == set(numbered(2, T5_ENCODER, "encoder.block.{}."))


@pytest.mark.parametrize("head", ["question_answering", "sequence_classification"])
def test_other_heads_of_t5_are_no_sites(head):
    assert find_sites(tiny_model("t5", head)) == find_sites(tiny_model("t5"))


def test_deberta_projections_shared_with_content_are_counted_once():
    sites = find_sites(tiny_model("deberta-v2", share_att_key=True))
    assert sum(site.shape[0] * site.shape[1] for site in sites) == 2 * (4 * D * D + 2 * D * F)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_output_embeddings_are_no_site_tied_or_not(family, tie):
    model = tiny_model(family, "causal_lm", tie_word_embeddings=tie)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert find_sites(model) == find_sites(tiny_model(family))


def test_bert_base_has_the_prunable_weights_of_bert_tickets():
    with torch.device("meta"):
        model, classifier = BertModel(BertConfig()), BertForSequenceClassification(BertConfig())
    sites = find_sites(model)
    assert len(sites) == 73
    assert sum(site.shape[0] * site.shape[1] for site in sites) == 85_524_480
    assert find_sites(classifier) == sites


def test_gpt2_small_has_its_transformer_blocks():
    with torch.device("meta"):
        model = tiny_model("gpt2", n_embd=768, n_layer=12, n_head=12)
    assert sum(site.shape[0] * site.shape[1] for site in find_sites(model)) == 12 * 12 * 768**2
