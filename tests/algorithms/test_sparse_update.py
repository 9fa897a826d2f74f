"""A product with a borrowed weight: equal to the dense one, and the weight is always back to the same bits."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.algorithms.sparse_update import gradient_at, index_dtype, linear_with_update, make_pattern, update_alone


OUT, IN = 5, 7
PLACES = [0, 3, 8, 13, 14, 34]
LAYOUTS = pytest.mark.parametrize("input_first", [False, True], ids=["out x in", "in x out"])


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shape_of(input_first):
    return (IN, OUT) if input_first else (OUT, IN)


def pieces(input_first, dtype=torch.float32):
    """x, weight, bias, values and their pattern."""
    weight, pattern = (
        drawn(*shape_of(input_first), seed=1, dtype=dtype),
        make_pattern(torch.tensor(PLACES), shape_of(input_first)),
    )
    x, bias, values = drawn(2, 3, IN, seed=2, dtype=dtype), drawn(OUT, seed=3, dtype=dtype), drawn(6, seed=4)
    return x, weight, bias, values.to(dtype), pattern


def dense(x, weight, bias, values, pattern, input_first):
    changed = weight.flatten().index_add(0, pattern.indices, values.to(weight.dtype)).view_as(weight)
    return F.linear(x, changed.t() if input_first else changed, bias)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def test_a_pattern_by_hand():
    pattern = make_pattern(torch.tensor([1, 2, 9]), (3, 4))
    assert pattern.indices.tolist() == [1, 2, 9]
    assert pattern.row_starts.tolist() == [0, 2, 2, 3]
    assert pattern.columns.tolist() == [1, 2, 1]
    assert {part.dtype for part in pattern} == {torch.int32}


def test_the_smaller_index_that_reaches_every_weight():
    assert index_dtype((2**16, 2**15 - 1)) == torch.int32
    assert index_dtype((2**16, 2**15)) == torch.int64


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([0, 12], "must be in 0..11, the weights of the matrix, got 12"),
        ([-1, 2], "got -1"),
        ([1, 1], "must not repeat, got 1"),
        ([2, 1], "must be sorted, got 1 after 2"),
    ],
)
def test_bad_indices_are_refused(indices, problem):
    with pytest.raises(ValueError, match=problem):
        make_pattern(torch.tensor(indices), (3, 4))


@LAYOUTS
def test_the_product_is_the_dense_one(input_first):
    x, weight, bias, values, pattern = pieces(input_first)
    expected = dense(x, weight, bias, values, pattern, input_first)
    found = linear_with_update(x, weight, bias, values, pattern, input_first=input_first)
    assert torch.equal(found, expected)
    alone = update_alone(x, values, pattern, OUT, input_first=input_first)
    base = F.linear(x, weight.t() if input_first else weight, bias)
    torch.testing.assert_close(base + alone, expected)


@LAYOUTS
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_in_double_precision(input_first, with_bias):
    x, weight, bias, values, pattern = pieces(input_first, torch.float64)
    inputs = [one.requires_grad_() for one in ([x, values, bias] if with_bias else [x, values])]

    def product(x, values, bias=None):
        return linear_with_update(x, weight, bias, values, pattern, input_first=input_first)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradcheck(lambda x, v: update_alone(x, v, pattern, OUT, input_first=input_first), inputs[:2])


@LAYOUTS
def test_gradients_at_the_places_only(input_first):
    x, _, _, _, pattern = pieces(input_first)
    rows, gradient = x.reshape(-1, IN), drawn(6, OUT, seed=5)
    whole = rows.t() @ gradient if input_first else gradient.t() @ rows
    found = gradient_at(pattern, rows, gradient, input_first=input_first)
    torch.testing.assert_close(found, whole.flatten()[torch.tensor(PLACES)])
    assert gradient_at(pattern, rows.bfloat16(), gradient.bfloat16(), input_first=input_first).dtype == torch.float32


@LAYOUTS
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_back_to_the_same_bits(input_first, contiguous, dtype):
    x, weight, bias, values, pattern = pieces(input_first, dtype)
    weight[0, 0], weight[0, 3] = -0.0, float("inf")  # bits that adding and subtracting would lose
    if not contiguous:
        weight = weight.t().contiguous().t()
    values = (values.float() * 1e3).requires_grad_()
    x.requires_grad_()
    before, version = bits(weight), weight._version
    result = linear_with_update(x, weight, bias, values, pattern, input_first=input_first)
    assert torch.equal(bits(weight), before)
    result.float().nan_to_num().sum().backward()
    assert torch.equal(bits(weight), before)
    assert weight._version == version
    assert weight.is_contiguous() is contiguous
    assert values.grad.dtype == torch.float32
    assert x.grad.dtype == dtype


@LAYOUTS
def test_a_weight_of_other_strides_gives_the_same(input_first):
    x, weight, bias, values, pattern = pieces(input_first)
    expected = linear_with_update(x, weight, bias, values, pattern, input_first=input_first)
    strided = weight.t().contiguous().t()
    torch.testing.assert_close(
        linear_with_update(x, strided, bias, values, pattern, input_first=input_first), expected
    )


def test_the_weight_is_back_after_an_exception():
    _, weight, bias, values, pattern = pieces(False)
    before = bits(weight)
    with pytest.raises(RuntimeError, match="shapes"):
        linear_with_update(drawn(2, IN + 1), weight, bias, values, pattern)
    assert torch.equal(bits(weight), before)
    # The lock is free again.
    assert linear_with_update(drawn(2, IN), weight, bias, values, pattern).shape == (2, OUT)


def test_a_weight_that_another_operation_saved_can_still_be_differentiated():
    x, weight, bias, values, pattern = pieces(False)
    other = drawn(2, IN, seed=6).requires_grad_()
    saved = F.linear(other, weight)
    linear_with_update(x, weight, bias, values.requires_grad_(), pattern).sum().backward()
    saved.sum().backward()
    torch.testing.assert_close(other.grad, weight.sum(0).expand(2, -1))


def test_threads_see_no_borrowed_weight():
    weight, before = drawn(64, 64, seed=1), drawn(64, 64, seed=1)
    pattern = make_pattern(torch.arange(0, 4096, 3), (64, 64))
    x, values, wrong = drawn(32, 64, seed=2), torch.full((1366,), 3.0), []
    expected = linear_with_update(x, weight, None, values, pattern)

    def work():
        for _ in range(50):
            if not torch.equal(linear_with_update(x, weight, None, values, pattern), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(weight, before)


def test_small_updates_of_a_reduced_precision_are_rounded_once():
    weight = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    pattern = make_pattern(torch.tensor([0]), (1, 1))
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    # The next bfloat16 after 1 is 1.0078125: 0.0040 is just above half of the step, and reaches it from float32.
    for value, expected in ((0.0038, 1.0), (0.0040, 1.0078125)):
        assert linear_with_update(x, weight, None, torch.tensor([value]), pattern).item() == expected


@LAYOUTS
def test_autocast(input_first):
    x, weight, bias, values, pattern = pieces(input_first)
    x.requires_grad_(), values.requires_grad_()
    before = bits(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_with_update(x.bfloat16(), weight, bias, values, pattern, input_first=input_first)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert torch.equal(bits(weight), before)
    expected = dense(x.detach(), weight, bias, values.detach(), pattern, input_first)
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.05)
    assert x.grad.dtype == values.grad.dtype == torch.float32


@LAYOUTS
def test_compiled_in_one_graph(input_first):
    x, weight, bias, values, pattern = pieces(input_first)
    gradients = []
    for compiled in (False, True):
        inputs = [one.clone().requires_grad_() for one in (x, values)]

        def product(x, values):
            return linear_with_update(x, weight, bias, values, pattern, input_first=input_first)

        if compiled:
            product = torch.compile(product, fullgraph=True, backend="aot_eager")
        result = product(*inputs)
        result.square().sum().backward()
        gradients.append((result.detach(), *(one.grad for one in inputs)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_values_that_need_no_gradient_keep_no_input():
    x, weight, bias, values, pattern = pieces(False)
    result = linear_with_update(x.requires_grad_(), weight, bias, values, pattern)
    held = [one for one in result.grad_fn.saved_tensors if one is not None]
    assert all(one.shape != x.shape for one in held)
    result.sum().backward()
    expected = weight.flatten().index_add(0, pattern.indices, values).view_as(weight).sum(0)
    torch.testing.assert_close(x.grad, expected.expand_as(x))
