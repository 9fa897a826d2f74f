import pytest
import torch

from sparse_hf.algorithms.scores import gradient_scores, magnitude_scores, random_scores


def test_magnitude_is_the_absolute_value_in_the_weights_dtype():
    weight = torch.nn.Parameter(torch.tensor([[-2.0, 0.5], [0.0, -0.0]], dtype=torch.bfloat16))
    scores = magnitude_scores(weight)
    assert scores.tolist() == [[2.0, 0.5], [0.0, 0.0]]
    assert scores.dtype == torch.bfloat16
    assert not scores.requires_grad


def test_gradient_scores_are_the_first_order_change_of_the_loss():
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    (weight * torch.tensor([0.5, 4.0, -1.0])).sum().backward()
    # The loss is linear, so removing weight i changes it by exactly |w_i * g_i|.
    assert gradient_scores(weight, weight.grad).tolist() == [0.5, 8.0, 3.0]


def test_gradient_scores_do_not_underflow_in_half_precision():
    small = torch.tensor([2.0**-14], dtype=torch.float16)
    assert (small * small).item() == 0.0
    scores = gradient_scores(small, small)
    assert scores.dtype == torch.float32
    assert scores.item() == 2.0**-28


def test_gradient_scores_refuse_another_shape():
    with pytest.raises(ValueError, match=r"`gradient` must have the shape of `weight` \(2, 3\), got \(3,\)"):
        gradient_scores(torch.zeros(2, 3), torch.zeros(3))


def test_random_scores_follow_the_generator_alone():
    weight = torch.zeros(40, 50, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    first, second = random_scores(weight, generator), random_scores(weight, generator)
    again = random_scores(weight, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32
    assert first.shape == weight.shape
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean().item() - 0.5) < 0.03  # 4.6 standard errors
