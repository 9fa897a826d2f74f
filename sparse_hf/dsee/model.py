"""DSEE as PEFT sees it: which modules are adapted, and what happens when an adapter is made, loaded or merged."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_hf.algorithms.bits import unpack_bits
from sparse_hf.dsee.choices import choose_support, fingerprint, seeded
from sparse_hf.dsee.config import DseeConfig
from sparse_hf.dsee.layer import PREFIX, DseeLayer, DseeLinear
from sparse_hf.dsee.masks import adapted_layers, n_m_masks, unstructured_masks


logger = logging.getLogger(__name__)


class DseeModel(BaseTuner):
    """The tuner that `get_peft_model` makes for a `DseeConfig`. Users work with the `PeftModel` around it."""

    prefix = PREFIX
    tuner_layer_cls = DseeLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: choose its support and mask, or check the base if a file is about to be read."""
        config = self.peft_config[adapter_name]
        if config.masked_modules and not any(_is_masked(config, name) for name, _ in model.named_modules()):
            raise ValueError(
                f"`masked_modules` must name modules of the model, got {config.masked_modules}, which match none."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = adapted_layers(model, adapter_name)
        found = fingerprint(layers)
        config.found_on(found)
        if config.base_fingerprint is not None:
            _check_base(config, adapter_name, found)
            return
        for name, layer in layers.items():
            if adapter_name in layer.sparse_hf_dsee_values:
                layer.set_support(adapter_name, choose_support(layer, name, config))
        masks: dict[str, Tensor] = {}
        if config.base_pattern:
            masks = n_m_masks(layers, config.base_pattern)
        elif config.base_sparsity:
            masks = unstructured_masks(layers, adapter_name, config.base_sparsity)
        if masks:
            _check_untied(model, layers)
        for name, mask in masks.items():
            layers[name].set_mask(adapter_name, mask)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        """What PEFT does around a forward: nothing. But it would drop a mixture of adapters without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("DSEE cannot mix adapters in one batch (`adapter_names`): call `set_adapter` instead.")
        return contextlib.nullcontext()

    @staticmethod
    def _check_target_module_exists(peft_config: DseeConfig, key: str) -> Any:
        tuned = check_target_module_exists(peft_config, key)
        if tuned or isinstance(tuned, _ExcludedModule):
            return tuned
        return _is_masked(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: DseeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(f"DSEE adapts modules, not single parameters, got `{parameter_name}` of {current_key}.")
        tuned = bool(check_target_module_exists(peft_config, current_key))
        generator = seeded(peft_config.seed, current_key)
        if isinstance(target, DseeLayer):
            target.update_layer(adapter_name, peft_config, tuned, generator)
            return
        quantization = get_quantization_kwargs(self)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base, **quantization)
        if not isinstance(base, (nn.Linear, Conv1D)) and getattr(backend, "layer_type", None) != "linear":
            raise TypeError(
                f"DSEE adapts linear layers (`nn.Linear`, `Conv1D`, quantized ones), got {type(base).__name__} at "
                f"`{current_key}`: leave it out of `target_modules`, or name it in `modules_to_save`."
            )
        adapted = DseeLinear(target, **quantization)
        adapted._active_adapter = adapter_name
        adapted.update_layer(adapter_name, peft_config, tuned, generator)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DseeConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, but refuse a file that does not fill the adapter or holds more than it.

        Masks are an exception: a checkpoint may have been written after they were chosen, so room is made for them.
        """
        _make_room_for_masks(model, config, adapter_name, state_dict)
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        held = {key: value for key, value in model.state_dict().items() if f".{PREFIX}" in key}
        wanted = {key for key in held if key.endswith(f".{adapter_name}")}
        given = {key for key in renamed if f".{PREFIX}" in key}
        if problems := sorted(wanted ^ given):
            raise ValueError(
                f"The adapter's file and its config disagree, got {len(problems)} tensors in only one of them "
                f"({', '.join(problems[:3])}): the file is damaged or belongs to another model."
            )
        for key in sorted(wanted):
            if renamed[key].shape != held[key].shape:
                raise ValueError(
                    f"`{key}` must have shape {tuple(held[key].shape)} by the adapter's config and this model, got "
                    f"{tuple(renamed[key].shape)} in its file: it belongs to another model."
                )
        return renamed

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        sparse: bool = False,
        batch: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The stock model with the adapters in its weights.

        Args:
            sparse: apply S1 to the sum too. Without it U V fills S1's zeros, as in the paper; with it the merged
                matrices keep them, and the function changes: a log line says how much of their norm is left out.
            batch: inputs of the model, for which the line says as well how much the sparse merge changes the output
                (logits, or hidden states of a model without a head).
        """
        if not sparse:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        before = None if batch is None else _first_output(self.model, batch)
        layers = [layer for _, layer in _dsee_layers(self.model)]
        taken = [layer.merge(safe_merge, adapter_names, sparse=True, keep_unmerged=False) for layer in layers]
        merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        change = ""
        if before is not None:
            difference = (_first_output(merged, batch) - before).norm() / before.norm().clamp_min(1e-30)
            change = f" The output of the given batch changed by {float(difference):.2g} of its norm."
        logger.warning(
            "The sparse merge left out updates under S1: %.2g of a merged matrix's norm on average, %.2g at most.%s "
            "Evaluate the merged model.",
            sum(taken) / max(1, len(taken)),
            max(taken, default=0.0),
            change,
        )
        return merged


@torch.no_grad()
def _first_output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """In eval mode, in float32; labels are left out, with which a loss would come first."""
    training = model.training
    model.eval()
    try:
        return model(**{name: one for name, one in batch.items() if name != "labels"})[0].float()
    finally:
        model.train(training)


class DseeSparsity(NamedTuple):
    """Shares of zeros over all adapted matrices, in [0, 1]."""

    base: float  # of W0 ⊙ S1
    merged: float  # of W0 ⊙ S1 + scaling (U V + S2), which U V makes dense


@torch.no_grad()
def dsee_sparsity(model: nn.Module) -> DseeSparsity:
    """How sparse the adapted matrices of a model are, with its active adapters, before and after a merge."""
    zeros = merged = count = 0
    for _, layer in _dsee_layers(model):
        layer.settle()
        weight = layer.get_base_weight()
        names = [name for name in layer.active_adapters if name in layer.sparse_hf_dsee_scaling]
        total = weight.float() + sum(layer.get_delta_weight(name).float() for name in names)
        count, zeros, merged = (
            count + weight.numel(),
            zeros + int((weight == 0).sum()),
            merged + int((total == 0).sum()),
        )
    return DseeSparsity(zeros / max(1, count), merged / max(1, count))


def _dsee_layers(model: nn.Module) -> list[tuple[str, DseeLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DseeLayer)]


def _make_room_for_masks(
    model: nn.Module, config: DseeConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    layers = {
        name: layer
        for name, layer in adapted_layers(model, adapter_name).items()
        if adapter_name not in layer.sparse_hf_dsee_mask and f"{name}.{PREFIX}mask" in state_dict
    }
    kept = weights = 0
    for name, layer in layers.items():
        layer.set_mask(adapter_name, torch.ones(layer.weight_shape, dtype=torch.bool))
        weights += layer.weight.numel()
        kept += int(unpack_bits(state_dict[f"{name}.{PREFIX}mask"], layer.weight_shape).sum())
    if layers and not config.base_pattern:
        config.base_sparsity = 1 - kept / weights  # by which the next one to load it makes room


def _check_untied(model: nn.Module, layers: dict[str, DseeLayer]) -> None:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, layer in layers.items():
        if embeddings is not None and layer.weight is getattr(embeddings, "weight", None):
            raise ValueError(f"S1 would remove the input embeddings that `{name}` is tied to: leave that module out.")


def _is_masked(config: DseeConfig, key: str) -> bool:
    if config.masked_modules is None:
        return False
    masked = copy.copy(config)
    masked.target_modules = config.masked_modules
    return bool(check_target_module_exists(masked, key))


def _check_base(config: DseeConfig, adapter_name: str, found: str | None) -> None:
    if found is None or found == config.base_fingerprint:
        return
    message = (
        f"Adapter `{adapter_name}` was trained on other base weights than these (fingerprint "
        f"{config.base_fingerprint[:12]}, got {found[:12]}): load `{config.base_model_name_or_path}` as it was."
    )
    if config.on_other_base == "raise":
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=2)
