"""Which class does a name in a config stand for, and which names do the auto classes learn from us?"""

import inspect

import transformers
from transformers import AutoConfig, PreTrainedModel

from sparse_hf.anatomy import modeling_slim
from sparse_hf.anatomy.modeling_slim import slim_config_class
from sparse_hf.anatomy.unit_families import UNIT_TABLES


def register_slim_models() -> None:
    """Let `AutoConfig` and every `AutoModel...` read slim models of the families in the table of units.

    Models are registered when a first config of their family is read.
    """
    for model_type in UNIT_TABLES:
        AutoConfig.register(f"slim_{model_type}", slim_config_class(model_type), exist_ok=True)


def model_class_named(name: object) -> type[PreTrainedModel] | None:
    """The model class of Transformers, or the slim class made from one, that `architectures` in a config names."""
    if not isinstance(name, str):
        return None
    found = getattr(modeling_slim if name.startswith("Slim") else transformers, name, None)
    return found if inspect.isclass(found) and issubclass(found, PreTrainedModel) else None
