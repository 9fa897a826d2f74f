"""The step that gives a stored tensor its zeros, as Transformers takes it before all else it does with a weight."""

import copy
from collections import defaultdict
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, build_glob_alternation

from sparse_hf.storage.compressed_tensor import expand_tensor
from sparse_hf.storage.stored_form import LONGEST_HEAD, StoredForm, read_form
from sparse_hf.storage.torch_dtypes import TORCH_DTYPES


class Expanded(NamedTuple):
    """A tensor that has its zeros and its dtype already."""

    tensor: Tensor


class Expand(ConversionOps):
    """Give stored tensors their zeros, and every tensor the dtype in which a dense checkpoint would be read.

    Transformers turns what goes wrong in a step into a report; so the first error is kept for the quantizer to raise,
    and zeros take the place of the tensor until then.
    """

    def __init__(self, wanted: dict[str, Tensor], dtype_plan: dict[str, torch.dtype], most_elements: int) -> None:
        """
        Args:
            wanted: the model's state dict, for its dtypes.
            dtype_plan: patterns of parameters that are kept in another dtype than the model's.
            most_elements: of a stored tensor.
        """
        self.error: ValueError | None = None
        self._dtypes = {name: tensor.dtype for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
        self._plan = dtype_plan
        self._patterns, self._planned, _ = build_glob_alternation(list(dtype_plan)) if dtype_plan else (None, {}, {})
        self._most_elements = most_elements

    def __deepcopy__(self, memo: dict) -> "Expand":
        return self  # converters are copied for every parameter; the error must be seen in one place

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **others: object,
    ) -> dict[str, list[Tensor]]:
        """Called by Transformers with the tensors of one or more parameters, by the pattern that each matched."""
        dtype = self._dtype_of(full_layer_name)
        expanded = {
            name: [
                one.tensor if isinstance(one, Expanded) else self._expanded(one).to(dtype)
                for one in (tensors if isinstance(tensors, list) else [tensors])
            ]
            for name, tensors in input_dict.items()
        }
        alone = target_patterns == [r"\1"]
        return {full_layer_name: next(iter(expanded.values()))} if alone else expanded

    @torch.no_grad()
    def ahead(self, tensor: Tensor, name: str) -> Expanded:
        """The tensor of the parameter `name` as `convert` would give it; called by several threads."""
        return Expanded(self._expanded(tensor).to(self._dtype_of(name)))

    def _dtype_of(self, name: str) -> torch.dtype | None:
        match = self._patterns and self._patterns.search(name)
        return self._plan[self._planned[match.lastgroup]] if match else self._dtypes.get(name)

    def _expanded(self, tensor: Tensor) -> Tensor:
        if not is_stored_tensor(tensor):
            return tensor
        stored = tensor.cpu().numpy()
        try:
            data, form = expand_tensor(stored, self._most_elements)
        except ValueError as error:
            self.error = self.error or error
            form = read_form(stored[:LONGEST_HEAD].tobytes(), len(stored))
            shape = form.shape if form.size <= self._most_elements else (0,)
            return torch.zeros(shape, dtype=TORCH_DTYPES[form.dtype], device=tensor.device)
        return _as_tensor(data, form).to(tensor.device)


class ExpandAhead(WeightConverter):
    """The converter of a parameter that has no other: `Expand`, done by the threads of Transformers that read tensors.

    Without these threads tensors arrive as functions, and are expanded one by one when their turn has come.
    """

    __slots__ = ()

    def __init__(self, step: Expand) -> None:
        super().__init__([r"^(.+)$"], [r"\1"], [step])

    def __deepcopy__(self, memo: dict) -> "ExpandAhead":
        """For one parameter; copying the patterns too would take longer than expanding most tensors."""
        copied = copy.copy(self)
        copied.collected_tensors, copied.layer_targets = defaultdict(list), defaultdict(set)
        return copied

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: object) -> None:
        """Called by Transformers for every tensor that it begins to read."""
        step, expanded = self.operations[0], Future()

        def expand(read: Future) -> None:
            try:
                expanded.set_result(step.ahead(read.result(), target_key))
            except Exception as error:
                expanded.set_exception(error)  # raised where the tensor is asked for

        if isinstance(future, Future):
            future.add_done_callback(expand)  # runs in the thread that has read it
            future = expanded
        super().add_tensor(target_key, source_key, source_pattern, future)


def _as_tensor(data: np.ndarray, form: StoredForm) -> Tensor:
    return torch.from_numpy(data).view(TORCH_DTYPES[form.dtype]).reshape(form.shape)


def is_stored_tensor(tensor: Tensor) -> bool:
    """Whether a tensor of a compressed checkpoint is in one of our forms: all that are uint8 and 1-D are."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 1
