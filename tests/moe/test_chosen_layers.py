import pytest

from sparse_hf.moe.chosen_layers import chosen_layers
from sparse_hf.moe.targets import MIXTRAL, QWEN3_MOE


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(8)),
        ([1, 3], (1, 3)),
        ("4-6", (4, 5, 6)),
        ("every-2", (1, 3, 5, 7)),
        ("every-3", (2, 5)),
        ("0, 3,5-7", (0, 3, 5, 6, 7)),
        ("7", (7,)),
    ],
)
def test_layers_by_number_range_and_step(layers, expected):
    assert chosen_layers(QWEN3_MOE, 8, layers) == frozenset(expected)


@pytest.mark.parametrize(
    "layers", ["", "8", "3-9", "every-0", "every-x", "a", "1-", "-1", "99999999999999-3", [8], []]
)
def test_others_are_refused(layers):
    with pytest.raises(ValueError, match="`layers` must .* layers 0 to 7"):
        chosen_layers(QWEN3_MOE, 8, layers)


def test_an_empty_range_and_a_target_without_dense_layers():
    with pytest.raises(ValueError, match="must name some"):
        chosen_layers(QWEN3_MOE, 8, "5-4")
    with pytest.raises(ValueError, match="a mixture in every layer"):
        chosen_layers(MIXTRAL, 8, "0-6")
    assert chosen_layers(MIXTRAL, 8, "0-7") == frozenset(range(8))
