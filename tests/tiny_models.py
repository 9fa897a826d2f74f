"""Tiny random models of the tested families. Nothing is downloaded: every model is built from its config."""

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


VOCABULARY = 96
LABELS = 3

_ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    num_labels=LABELS,
)
_DECODER = dict(
    _ENCODER,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=64,
)
_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    num_labels=LABELS,
)

# family -> (config class, its arguments). Two layers, width 32, MLP width 64, 4 heads, of which 2 are key-value heads
# where the family shares them; 4 experts, 2 of them per token.
CONFIGS = {
    "bert": ("BertConfig", _ENCODER),
    "roberta": ("RobertaConfig", _ENCODER),
    "distilbert": (
        "DistilBertConfig",
        dict(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=40,
            num_labels=LABELS,
        ),
    ),
    "deberta-v2": (
        "DebertaV2Config",
        dict(
            _ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, pooler_hidden_size=32
        ),
    ),
    "vit": (
        "ViTConfig",
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_channels=3,
            num_labels=LABELS,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            num_labels=LABELS,
        ),
    ),
    "gpt-neox": ("GPTNeoXConfig", dict(_ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            num_labels=LABELS,
        ),
    ),
    "llama": ("LlamaConfig", _DECODER),
    "mistral": ("MistralConfig", _DECODER),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", _DECODER),
    "gemma": ("GemmaConfig", _DECODER),
    "phi3": ("Phi3Config", _DECODER),
    "t5": ("T5Config", _T5),
    "mixtral": ("MixtralConfig", dict(_DECODER, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        dict(
            _DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True),
    ),
    "gpt-oss": ("GptOssConfig", dict(_DECODER, num_local_experts=4, num_experts_per_tok=2)),
}

HEADS = {
    "base": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "image_classification": "AutoModelForImageClassification",
}


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """The config of a tiny model of `family` (a key of `CONFIGS`), with `changes` to its arguments."""
    config_class, arguments = CONFIGS[family]
    return getattr(transformers, config_class)(**{**arguments, **changes})


def tiny_model(family: str, head: str = "base", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model in eval mode, equal for equal arguments; the global random state is left as it was.

    `head` is a key of `HEADS` or the name of a model class (`"T5EncoderModel"`); `changes` go to the config.
    """
    config = tiny_config(family, **changes)
    model_class = getattr(transformers, HEADS.get(head, head))
    build = model_class.from_config if head in HEADS else model_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config).eval()


def tiny_inputs(model: PreTrainedModel, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs for `model`: `pixel_values` for a ViT, else `input_ids` and `attention_mask`, all ones.

    Token ids are at least 3, so none is special. Models with a decoder beside an encoder get `decoder_input_ids` too,
    and their rows end in the end-of-sequence token, which T5ForSequenceClassification pools.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.model_type == "vit":
        size = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder and type(model).__name__ != "T5EncoderModel":
        ids[:, -1] = config.eos_token_id
        inputs["decoder_input_ids"] = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    return inputs
