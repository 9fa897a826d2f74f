"""A linear map of a frozen weight plus a few trained entries, without a dense copy or a dense gradient of the weight.

The entries are added to the weight in place for the length of one matrix product and taken back to the same bits
afterwards, so the frozen weight is never seen changed and nothing of its size is allocated. The entries' gradient is
taken at their places only (`torch.sparse.sampled_addmm`). See docs/dsee.md for what other ways cost.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_hf.algorithms.supports import check_support


# Two threads that use one model would see each other's borrowed weights; inside a thread no product nests in another.
_BORROWING = threading.Lock()


class Pattern(NamedTuple):
    """Where the entries are in a weight of R rows and C columns: sorted flat indices, and the same as CSR."""

    indices: Tensor  # int32 (int64 from 2^31 weights), shape (nnz,)
    row_starts: Tensor  # of the same dtype, shape (R + 1,)
    columns: Tensor  # of the same dtype, shape (nnz,)


def make_pattern(indices: Tensor, shape: tuple[int, int]) -> Pattern:
    """The pattern of flat indices into a weight of `shape`.

    Args:
        indices: int32 or int64, shape (nnz,), strictly increasing, in [0, R * C).

    Raises:
        ValueError: an index is out of range, repeated, or not in order, such as in a tampered file.
    """
    check_support(indices, shape[0] * shape[1])
    rows = torch.div(indices, shape[1], rounding_mode="floor")
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1, dtype=rows.dtype, device=rows.device))
    kind = index_dtype(shape)
    return Pattern(indices.to(kind), starts.to(kind), (indices - rows * shape[1]).to(kind))


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    """Of flat indices into a weight of `shape`: the smaller that can name all its places."""
    return torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64


def linear_with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, pattern: Pattern, *, input_first: bool = False
) -> Tensor:
    """x Wᵀ + b, where W is `weight` plus `values` at the places of `pattern`.

    Gradients reach `x`, `values` and `bias`, never `weight`. In a reduced precision the updated entries are summed in
    `values`' precision and rounded once. Under `torch.compile` the update is made on a copy, which the compiler may
    or may not fuse away; the result is the same.

    Args:
        x: shape (..., in).
        weight: shape (out, in), or (in, out) with `input_first` (GPT-2's `Conv1D`); frozen.
        bias: shape (out,), or None.
        values: floating, shape (nnz,).
    """
    if torch.compiler.is_compiling():
        changed = weight.detach().to(values.dtype).flatten().index_add(0, pattern.indices, values)
        return _product(x, changed.view_as(weight).to(x.dtype), bias, input_first)
    return _Linear.apply(x, weight, bias, values, *pattern, input_first)


def update_alone(x: Tensor, values: Tensor, pattern: Pattern, features: int, *, input_first: bool = False) -> Tensor:
    """x Sᵀ for the entries alone, where the weight cannot be written to: quantized, or changed by another update.

    Slow and large for many entries: keeps nnz numbers per row of `x` for the backward pass.

    Args:
        x: shape (..., in).
        features: out.

    Returns:
        shape (..., out), in `x`'s dtype.
    """
    counts = pattern.row_starts.diff()
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=x.device), counts, output_size=values.numel())
    inputs, outputs = (rows, pattern.columns) if input_first else (pattern.columns, rows)
    products = x.index_select(-1, inputs) * values.to(x.dtype)
    return x.new_zeros(*x.shape[:-1], features).index_add(-1, outputs, products)


def gradient_at(pattern: Pattern, x: Tensor, gradient: Tensor, *, input_first: bool = False) -> Tensor:
    """The weight's gradient at the places of `pattern`, for rows of inputs and of the output's gradient.

    Args:
        x: shape (T, in).
        gradient: shape (T, out).

    Returns:
        shape (nnz,), in float32, or float64 where `x` is.
    """
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32  # sampled_addmm has no other on the CPU
    x, gradient = x.to(precise), gradient.to(precise)
    left, right = (x, gradient) if input_first else (gradient, x)  # the weight's gradient is leftᵀ right
    shape = left.shape[1], right.shape[1]
    if 2 * pattern.columns.numel() <= sum(shape):  # fewer numbers to gather than the transposes below would copy
        rows = torch.div(pattern.indices, shape[1], rounding_mode="floor")
        return left.index_select(1, rows).mul_(right.index_select(1, pattern.columns)).sum(0)
    zeros = torch.zeros(pattern.columns.numel(), dtype=precise, device=x.device)
    with warnings.catch_warnings():  # one per process: CSR is called beta; what is used of it is tested here
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(
            pattern.row_starts, pattern.columns, zeros, size=shape, check_invariants=False
        )
    return torch.sparse.sampled_addmm(places, _transposed(left), _transposed(right).t(), beta=0.0).values()


def _transposed(matrix: Tensor) -> Tensor:
    """A contiguous transpose; `sampled_addmm` makes both of its own otherwise, on a CPU up to twice as slowly."""
    if matrix.device.type != "cpu":
        return matrix.t()
    result = matrix.new_empty(matrix.shape[::-1])
    for first in range(0, matrix.shape[0], 64):  # strips of rows that stay in the cache
        result[:, first : first + 64] = matrix[first : first + 64].t()
    return result


class _Linear(torch.autograd.Function):
    """`linear_with_update` outside of `torch.compile`: the updated weight is borrowed in both directions."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, indices, row_starts, columns, input_first):
        ctx.input_first = input_first
        ctx.save_for_backward(x if values.requires_grad else None, weight, values, indices, row_starts, columns)
        ctx.has_bias = bias is not None and bias.requires_grad
        with _borrowed(weight, indices, values, x.dtype) as updated:
            return _product(x, updated, None if bias is None else bias.to(x.dtype), input_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Of the input, the bias and the entries; the frozen weight has none."""
        x, weight, values, *pattern = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad, gradient.reshape(-1, gradient.shape[-1])
        for_x = for_values = None
        if wanted[0]:
            with _borrowed(weight, pattern[0], values, gradient.dtype) as updated:
                for_x = gradient @ (updated.t() if ctx.input_first else updated)
        if wanted[3]:
            inputs = x.reshape(-1, x.shape[-1])
            found = gradient_at(Pattern(*pattern), inputs, rows, input_first=ctx.input_first)
            for_values = found.to(values.dtype)
        return for_x, None, rows.sum(0) if ctx.has_bias else None, for_values, None, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, input_first: bool) -> Tensor:
    return F.linear(x, weight.t() if input_first else weight, bias)


@contextlib.contextmanager
def _borrowed(weight: Tensor, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight with its update, in `dtype`: itself where that is possible, and then put back to the same bits."""
    # `.data` has a version counter of its own: other operations have saved this weight for their backward.
    weight = weight.data
    with _BORROWING:  # also for reading: another thread may have borrowed the same weight
        before = weight.view(-1)[indices] if weight.is_contiguous() else weight.flatten()[indices]
        after = (before.to(values.dtype) + values.detach()).to(dtype)
        if dtype == weight.dtype and weight.is_contiguous():
            flat = weight.view(-1)
            flat[indices] = after
            try:
                yield weight
            finally:
                flat[indices] = before
            return
        copy = weight.to(dtype, copy=True).contiguous()
    copy.view(-1)[indices] = after
    yield copy
