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
    assert max(sizes) <= 512 * 1024


def test_a_model_of_seven_billion_weights_costs_three_megabytes():
    matrices = [4096 * 4096] * 128 + [4096 * 11008] * 96
    assert 3 * 2**20 < bytes_of_selection(matrices) < 3.1 * 2**20
