"""One adapted matrix: W = W0 ⊙ S1 + scaling (U V + S2)."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.algorithms.sparse_update import Pattern, make_pattern
from sparse_hf.dsee.baked_mask import BakedMask
from sparse_hf.dsee.config import DseeConfig
from sparse_hf.dsee.new_adapter import make_room
from sparse_hf.dsee.product import adapted_product, dense_update, merged_weight
from sparse_hf.dsee.seen import Seen
from sparse_hf.dsee.weight_parts import WeightRun, is_split, shape_of, whole_from_run


PREFIX = "sparse_hf_dsee_"


class DseeLayer(BaseTunerLayer):
    """What PEFT knows of an adapted matrix.

    Every attribute's name begins with the method's name, by which PEFT and Transformers find what to save. Indices and
    masks are in the weight's own layout: (out, in), or (in, out) for `Conv1D`.
    """

    adapter_layer_names = (f"{PREFIX}U", f"{PREFIX}V", f"{PREFIX}values")
    other_param_names = (f"{PREFIX}indices", f"{PREFIX}mask", f"{PREFIX}scaling", f"{PREFIX}dropout")

    def _begin(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        self.sparse_hf_dsee_U = nn.ParameterDict()  # (out, r)
        self.sparse_hf_dsee_V = nn.ParameterDict()  # (r, in)
        self.sparse_hf_dsee_values = nn.ParameterDict()  # (nnz,)
        self.sparse_hf_dsee_indices = BufferDict(persistent=True)  # (nnz,), sorted
        self.sparse_hf_dsee_mask = BufferDict(persistent=True)  # S1, eight weights per byte
        self.sparse_hf_dsee_scaling: dict[str, float] = {}
        self.sparse_hf_dsee_dropout = nn.ModuleDict()
        self.sparse_hf_dsee_baked = BakedMask()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.register_buffer("_before_merge", None, persistent=False)
        self._patterns: dict[str, tuple[Seen, Pattern]] = {}
        self._settled: list[Seen] = []
        self._weight_seen: Seen | None = None
        self._awaited: dict[str, Seen] = {}  # placeholders of what a file should bring
        self._looked = False  # whether the files' contents are known to be in force; see `forward`
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.input_first = isinstance(base, Conv1D)
        if self.input_first:
            self.in_features, self.out_features = shape_of(base.weight)
        else:
            self.in_features, self.out_features = base.in_features, base.out_features
        self.register_load_state_dict_post_hook(_look_after_loading)

    def pattern(self, adapter_name: str) -> Pattern:
        """Where S2's entries are."""
        return self._patterns[adapter_name][1]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the frozen weight in its own layout."""
        if self.input_first:
            return self.in_features, self.out_features
        return self.out_features, self.in_features

    def update_layer(self, adapter_name: str, config: DseeConfig, tuned: bool, generator: torch.Generator) -> None:
        """Make room for an adapter. Its support and its mask are chosen, or loaded, afterwards.

        Args:
            tuned: whether the matrix gets U V and S2, or S1 alone.
        """
        if config.base_sparsity or config.base_pattern:
            self._check_maskable()
        make_room(self, adapter_name, config, tuned, generator)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._looked = False
        if config.base_fingerprint is not None:
            placeholder = self._brought(adapter_name)
            if placeholder is not None:
                self._awaited[adapter_name] = Seen.of(placeholder)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_maskable(self) -> None:
        if self.quantization_backend is not None:
            raise ValueError(
                f"S1 needs weights that can hold exact zeros, got a base quantized by "
                f"{self.quantization_backend.backend_name}: prune before quantizing, or use `base_sparsity=0`."
            )

    # ---- S1 and S2 in force

    @torch.no_grad()
    def set_mask(self, adapter_name: str, mask: Tensor) -> None:
        """Give an adapter another S1: bool, in the weight's layout, True = kept."""
        self._check_maskable()
        if mask.shape != self.weight_shape:
            raise ValueError(f"A mask must have its weight's shape {self.weight_shape}, got {tuple(mask.shape)}.")
        self.sparse_hf_dsee_mask[adapter_name] = pack_bits(mask).to(self.weight.device)
        self.settle()

    @torch.no_grad()
    def set_support(self, adapter_name: str, indices: Tensor) -> None:
        """Give an adapter's S2 other places: flat, sorted, as many as before."""
        held = self.sparse_hf_dsee_indices[adapter_name]
        self.sparse_hf_dsee_indices[adapter_name] = indices.to(device=held.device, dtype=held.dtype)
        self.settle()

    def frozen_weight(self) -> Tensor:
        """W0: the weight without the masks and updates of any adapter; a copy where it differs from what is held.

        Where the weight is split all ranks ask together, and each gets all of it.

        Raises:
            ValueError: an adapter is merged.
        """
        if (run := self.frozen_run()) is not None:
            return whole_from_run(run.weights, self.weight)
        weight = self.get_base_weight()
        if self.sparse_hf_dsee_baked.bits is not None:
            weight = weight.clone()
            self.sparse_hf_dsee_baked.restore_(weight)
        return weight

    def frozen_run(self) -> WeightRun | None:
        """A copy of this rank's part of W0; None where the weight is whole.

        Raises:
            ValueError: an adapter is merged.
        """
        if self.merged:
            raise ValueError(f"W0 is not at hand while {self.merged_adapters} are merged: unmerge them first.")
        return self.sparse_hf_dsee_baked.unmasked(self.weight) if is_split(self.weight) else None

    @torch.no_grad()
    def settle(self, names: list[str] | None = None) -> None:
        """Bake the masks of `names` (else of the active adapters) into the weight, if they are not; index supports."""
        weight = self.weight
        if self.merged or weight.device.type == "meta":
            return
        for name, indices in self.sparse_hf_dsee_indices.items():
            if indices.device.type == "meta":
                return
            if name not in self._patterns or not self._patterns[name][0].still(indices):
                self._patterns[name] = Seen.of(indices), make_pattern(indices, self.weight_shape)
        if names is None:
            names = [] if self.disable_adapters else self.active_adapters
        masks = [self.sparse_hf_dsee_mask[name] for name in names if name in self.sparse_hf_dsee_mask]
        self._notice_other_weight(weight)
        if len(masks) == len(self._settled) and all(map(Seen.still, self._settled, masks)):
            return
        self.sparse_hf_dsee_baked.restore_(weight)
        self.sparse_hf_dsee_baked.forget()
        if masks:
            kept = [unpack_bits(mask, self.weight_shape) for mask in masks]
            self.sparse_hf_dsee_baked.bake_(weight, torch.stack(kept).all(0))
        self._settled = [Seen.of(mask) for mask in masks]
        self._weight_seen = Seen.of(weight)

    def _notice_other_weight(self, weight: Tensor) -> None:
        """If other base weights were loaded over the masked ones, mask them anew and forget what was removed."""
        if self._weight_seen is None or self._weight_seen.still(weight):
            return
        if self.sparse_hf_dsee_baked.is_filled(weight):
            self.sparse_hf_dsee_baked.forget()
            self._settled = []
        self._weight_seen = Seen.of(weight)  # with the same zeros it is the same base: DDP writes to weights too

    def look(self) -> None:
        """Note that masks and supports may have been loaded in place."""
        self.settle()
        self._awaited = {name: seen for name, seen in self._awaited.items() if seen.still(self._brought(name))}
        self._looked = True

    def _brought(self, name: str) -> Tensor | None:
        held = self.sparse_hf_dsee_indices if name in self.sparse_hf_dsee_indices else self.sparse_hf_dsee_mask
        return dict(held.items()).get(name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.settle()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._patterns.pop(adapter_name, None)
        self.settle()

    # ---- the function

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            # Transformers loads adapters without telling modules; `train()`, `eval()` or one eager forward makes up
            # for that. Before any of them the first compiled one stops here once.
            if not self._looked:
                _look_outside_the_graph(self)
        elif not self._looked:
            self.look()
        if self._awaited:
            _check_filled(self)
        names = [name for name in self.active_adapters if name in self.sparse_hf_dsee_scaling]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        return adapted_product(self, x, names)

    # ---- merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """scaling (U V + S2), dense, in the weight's layout; PEFT's name for it."""
        return dense_update(self, adapter_name)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        sparse: bool = False,
        keep_unmerged: bool = True,
    ) -> float:
        """Write the sum into the frozen weight.

        Args:
            safe_merge: check for values that are not finite first.
            sparse: apply S1 to the sum, so that the merged matrix keeps its zeros; another function than the
                adapter's.
            keep_unmerged: a copy, for `unmerge`.

        Returns:
            What `sparse` took away: the norm of the removed updates over that of the merged matrix.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.sparse_hf_dsee_scaling]
        if self.merged and (names or sparse):
            names = self.merged_adapters + names
            self.unmerge()
        if not names:
            return 0.0
        if is_split(self.weight):
            raise ValueError("Whole weights are merged, got parts of FSDP or DeepSpeed: load the saved adapter first.")
        self.settle(names)
        before = self.get_base_weight()
        merged, taken = merged_weight(self, names, sparse)
        if safe_merge and not torch.isfinite(merged).all():
            self.settle()
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken.")
        self._before_merge = before.clone() if keep_unmerged else None
        self.set_base_weight(merged.to(before.dtype))
        self.merged_adapters.extend(names)
        return taken

    def unmerge(self) -> None:
        """Give the weight back as it was before `merge`, bit for bit (a quantized one: quantized once more)."""
        if not self.merged or self._before_merge is None:
            return
        self.set_base_weight(self._before_merge)
        self._before_merge, self.merged_adapters = None, []
        self.settle()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The stock layer: merged, or with W0 in it."""
        for_good = self.merged and self._before_merge is None
        if merge and not for_good:
            self.merge(safe_merge, adapter_names, keep_unmerged=False)
        elif not merge:
            self.unmerge()
            self.sparse_hf_dsee_baked.restore_(self.weight)
        self.sparse_hf_dsee_baked.forget()
        return self.get_base_layer()


def _look_after_loading(layer: DseeLayer, _: Any) -> None:  # a function of the module's, so that models pickle
    layer.look()


@torch.compiler.disable
def _check_filled(layer: DseeLayer) -> None:
    layer.look()
    for name in layer._awaited:
        raise ValueError(
            f"The config of adapter `{name}` was saved with an adapter, whose file was not loaded: load both by "
            "`PeftModel.from_pretrained`, or set `base_fingerprint=None` to make a new adapter of that config."
        )


@torch.compiler.disable
def _look_outside_the_graph(layer: DseeLayer) -> None:
    layer.look()


class DseeLinear(nn.Module, DseeLayer):
    """An adapted `nn.Linear`, `Conv1D`, or quantized linear layer.

    PEFT looks for "Linear" in the name when `all-linear` meets an adapted model.
    """

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self._begin(base_layer, **quantization)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x Wᵀ + b; shapes as those of the base layer."""
        return self._adapted(x, *args, **kwargs)

    def train(self, mode: bool = True) -> "DseeLinear":
        """As any module; a moment to notice what was loaded in place."""
        self.look()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DseeLinear":
        same = self._weight_seen is not None and self._weight_seen.still(self.weight)
        super()._apply(fn, recurse)
        if same:
            self._weight_seen = Seen.of(self.weight)
        self._looked = False  # patterns are to follow to another device
        return self

    def __repr__(self) -> str:
        return "sparse_hf." + super().__repr__()
