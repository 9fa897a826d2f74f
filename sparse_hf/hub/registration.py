"""What does Transformers learn from us about checkpoints?"""

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from sparse_hf.hub.compressed_loading import QUANT_METHOD, CompressedConfig, CompressedQuantizer


def register_compressed_checkpoints() -> None:
    """Let every `from_pretrained` read what `save_compressed` writes."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(CompressedConfig)
        register_quantizer(QUANT_METHOD)(CompressedQuantizer)
