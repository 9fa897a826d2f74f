"""How does `from_pretrained` read a compressed checkpoint?

Transformers asks a quantizer what to do with the weights of a checkpoint whose config names its method. Ours says
where the weights lie, puts a step before everything else that is done with a tensor (merging of experts, for example),
which gives it its zeros and the dtype it would have been read in, and leaves a stock dense model behind, with no trace
of itself. Nothing of the files is trusted; what is wrong becomes a ValueError.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_hf.hub.expand_step import Expand, ExpandAhead, is_stored_tensor
from sparse_hf.storage.compressed_checkpoint import COMPRESSED_FILE, COMPRESSED_INDEX, FORMAT, QUANT_METHOD, forms_of
from sparse_hf.storage.stored_form import is_stored_like
from sparse_hf.storage.tensor_headers import read_header
from sparse_hf.storage.value_coding import check_zstd


WEIGHT_FILES = (COMPRESSED_FILE, COMPRESSED_INDEX)


class CompressedConfig(QuantizationConfigMixin):
    """What the config of a compressed checkpoint says.

    Args:
        format: the version of the format.
        weights: the file to load, `compressed.safetensors` or its index.
    """

    def __init__(self, format: str = FORMAT, weights: str = COMPRESSED_FILE, **others: object) -> None:
        if format != FORMAT:
            raise ValueError(
                f"`format` of a compressed checkpoint must be {FORMAT!r} here, got {format!r}. Update sparse_hf."
            )
        if weights not in WEIGHT_FILES:
            raise ValueError(f"`weights` of a compressed checkpoint must be one of {WEIGHT_FILES}, got {weights!r}.")
        self.quant_method = QUANT_METHOD
        self.format = format
        self.weights = weights
        self.dequantize = True  # so that Transformers forgets the method once the model is loaded


class CompressedQuantizer(HfQuantizer):
    """Reads a compressed checkpoint into a stock dense model."""

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Where the weights lie, said before they are looked for; this is asked by Transformers 5.17."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same for newer ones."""
        return self.update_tp_plan(config)

    def validate_environment(self, *arguments: object, device_map: object = None, **others: object) -> None:
        """Refuse what cannot be read."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise _offloaded()

    def get_new_dtype(self, converter: object, param: object, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for a stored tensor, whose bytes must arrive as they are."""
        if isinstance(param, Tensor):  # read at once instead of mapped
            stored = is_stored_tensor(param)
        else:
            stored = is_stored_like(param.get_dtype(), tuple(param.get_shape()))
        return None if stored else dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **others: object
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "A compressed checkpoint cannot be cut for tensor or expert parallelism while it is read. Turn it "
                "into a dense one with `sparse_hf.save_dense` first."
            )
        wanted = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
        for file in checkpoint_files:
            forms = forms_of(read_header(Path(file)).values())  # refuses what is damaged, before anything is loaded
            if any(form.planes for form in forms.values()):
                check_zstd()
        # Fused matrices that are split while they are read are larger than any parameter, but not than all of them.
        most = sum(tensor.numel() for tensor in wanted.values() if isinstance(tensor, Tensor))
        self._expand = Expand(wanted, model._get_dtype_plan(model.config.dtype), most)
        # In a forked process torch makes its threads anew when it is first used, which fails where several threads of
        # Transformers do that at once; so it is done here.
        torch.set_num_threads(torch.get_num_threads())

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Every tensor goes through ours first; those that have no converter get one."""
        ours = [_with_first(self._expand, transform) for transform in weight_conversions]
        self._rest = ExpandAhead(self._expand)
        return [*ours, self._rest]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: object) -> PreTrainedModel:
        if self._expand.error is not None:
            raise self._expand.error
        for name, tensor in model.state_dict().items():
            if name in self._shapes and tensor.shape != self._shapes[name]:
                raise ValueError(
                    f"`{name}` must be {list(self._shapes[name])}, the checkpoint has {list(tensor.shape)}. "
                    "It belongs to another config."
                )
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                raise _offloaded()
        model._weight_conversions = [
            _without_first(transform) for transform in model._weight_conversions if transform is not self._rest
        ]
        if "transformers_weights" in vars(model.config):
            del model.config.transformers_weights  # or a dense copy saved later would be looked for there
        return model

    def is_serializable(self) -> bool:
        """The loaded model is a stock one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is a stock one."""
        return True


def _with_first(step: Expand, transform: WeightTransform) -> WeightTransform:
    if not isinstance(transform, WeightConverter):
        return transform
    ours = copy.deepcopy(transform)
    ours.operations = [step, *ours.operations]
    return ours


def _without_first(transform: WeightTransform) -> WeightTransform:
    if isinstance(transform, WeightConverter):
        transform.operations = transform.operations[1:]
    return transform


def _offloaded() -> ValueError:
    return ValueError(
        "A compressed checkpoint cannot stay on disk, where its weights are not as they are used. Turn it into a "
        "dense one with `sparse_hf.save_dense` first."
    )
