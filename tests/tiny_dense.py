"""Tiny dense checkpoints of every family that has a mixture of experts."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10_000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
MULTIPLIERS = dict(
    embedding_multiplier=12.0, attention_multiplier=0.0625, residual_multiplier=0.22, logits_scaling=8.0
)
# What each family can vary and its targets can say, so that an entry left behind is seen.
DENSE = {
    "llama": ("LlamaConfig", dict(rope_parameters=LLAMA3, head_dim=12, rms_norm_eps=1e-3, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", dict(sliding_window=None, head_dim=12)),
    "ministral3": (
        "Ministral3Config",
        dict(sliding_window=5, head_dim=8, rope_parameters={**YARN, "llama_4_scaling_beta": 0.0}),
    ),
    "smollm3": ("SmolLM3Config", dict(no_rope_layers=[1, 1])),
    "phi3": ("Phi3Config", dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=12)),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        dict(
            head_dim=16,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "granite": ("GraniteConfig", dict(MULTIPLIERS, attention_bias=True)),
    "olmo2": ("Olmo2Config", dict(attention_bias=True)),
    "ernie4_5": ("Ernie4_5Config", dict(head_dim=8)),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1Config",
        dict(head_dim=12, attention_bias=True, rope_parameters=dict(rope_type="dynamic", alpha=1000.0, factor=1.0)),
    ),
    "lfm2": (
        "Lfm2Config",
        dict(layer_types=["conv", "full_attention"], block_multiple_of=8, conv_bias=True, norm_eps=1e-3),
    ),
    "cohere2": ("Cohere2Config", dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])),
}


def save_dense(folder, family, dtype=torch.float32, seed=0, **changes):
    """Norms and biases are random too: with ones and zeros a lost one would not be seen."""
    name, varied = DENSE[family]
    config = getattr(transformers, name)(**{**COMMON, **varied, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).config.dtype = dtype
    model.save_pretrained(folder)
    return model


def save_word_tokenizer(folder, words):
    """One token per word."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", *words.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
