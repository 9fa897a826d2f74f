"""The bytes that are foretold are those that a selection sends."""

import pytest
import torch

from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.algorithms.selection_sums import bytes_of_selection
from sparse_hf.algorithms.shard_layout import ShardLayout


def sent_by(shapes: list[tuple[int, ...]], density: float, min_per_tensor: int) -> list[int]:
    """Bytes of each sum that one process would have added up over ranks."""
    generator = torch.Generator().manual_seed(len(shapes))
    scores = [torch.randn(shape, generator=generator) for shape in shapes]
    sizes: list[int] = []

    def add(counts: torch.Tensor) -> torch.Tensor:
        sizes.append(counts.numel() * counts.element_size())
        return counts

    whole = ShardLayout.single_process(scores)
    layout = ShardLayout(whole.numels, whole.tensors, whole.starts, add)
    keep = round(density * sum(whole.numels))
    keep_largest(scores, keep, absolute=True, shards=layout, min_per_tensor=min_per_tensor)
    return sizes


@pytest.mark.parametrize(
    ("shapes", "min_per_tensor"),
    [
        ([(1,)], 1),
        ([(3, 5)], 1),
        ([(40, 30), (7, 11), (64,)], 1),
        ([(1024,)], 0),
        ([(1025,), (3,)], 0),
        ([(1000, 600), (77, 3)], 1),  # enough for a sample
        ([(1024, 1024), (1, 1), (200, 9)], 0),
    ],
)
@pytest.mark.parametrize("density", [0.3, 0.5])
def test_as_many_bytes_are_sent_as_foretold(shapes, density, min_per_tensor):
    if shapes == [(1,)]:
        density = 1.0
    sizes = sent_by(shapes, density, min_per_tensor)
    assert sum(sizes) == bytes_of_selection([torch.Size(shape).numel() for shape in shapes], min_per_tensor)
    assert max(sizes) <= 4096
    assert len(sizes) <= 20


@pytest.mark.parametrize(("small", "large", "of_each"), [(4096, 11008, (128, 96)), (8192, 28672, (320, 240))])
def test_seven_billion_weights_and_ten_times_as_many_cost_less_than_48_kilobytes(small, large, of_each):
    matrices = [small * small] * of_each[0] + [small * large] * of_each[1]
    assert 30_000 < bytes_of_selection(matrices) < 48_000


def test_a_budget_per_matrix_costs_six_mebibytes_for_seven_billion_weights():
    numels = [4096 * 4096] * 128 + [4096 * 11008] * 96
    assert 5.5 * 2**20 < sum(bytes_of_selection([numel]) for numel in numels) < 6 * 2**20
