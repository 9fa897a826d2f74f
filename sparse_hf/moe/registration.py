"""Which names do the auto classes learn from us?"""

from transformers import AutoConfig

from sparse_hf.moe.modeling_mixture import FEED_FORWARDS, MODEL_TYPE, mixture_config_class


def register_mixture_models() -> None:
    """Let `AutoConfig` and every `AutoModel...` read generic mixtures of experts.

    Models are registered when a first config of their family is read.
    """
    for model_type in FEED_FORWARDS:
        AutoConfig.register(f"{MODEL_TYPE}{model_type}", mixture_config_class(model_type), exist_ok=True)
