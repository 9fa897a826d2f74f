import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf.algorithms.settling import MaskHistory, distance_matrix, unit_mask_distance


def mask(row):
    return torch.tensor([bool(int(bit)) for bit in row])


def unit_masks(heads, neurons):
    return {"layer.0.heads": mask(heads), "layer.0.neurons": mask(neurons)}


def neurons(pruned, width=20):
    """The first `pruned` of the neurons pruned, so that two such masks differ by the difference / width."""
    return {"layer.0.neurons": torch.arange(width) >= pruned}


def history(pruned, **arguments):
    made = MaskHistory(**arguments)
    for step, count in enumerate(pruned):
        made.add(step, neurons(count))
    return made


def test_the_kind_that_differs_most_decides():
    # 1 of 2 heads and 1 of 8 neurons; all together it would be 2 of 10
    assert unit_mask_distance(unit_masks("10", "11110000"), unit_masks("11", "11110001")) == 0.5


def test_a_kind_is_normalised_over_all_layers():
    a = {"0.heads": mask("10"), "0.neurons": mask("1111"), "1.heads": mask("10"), "1.neurons": mask("1111")}
    b = {"1.neurons": mask("1100"), "1.heads": mask("10"), "0.heads": mask("11"), "0.neurons": mask("1111")}
    assert unit_mask_distance(a, b) == unit_mask_distance(b, a) == 0.25  # 1 of 4 heads, 2 of 8 neurons


pairs = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda widths: st.lists(st.lists(st.booleans(), min_size=sum(widths), max_size=sum(widths)), min_size=2).map(
        lambda rows: [
            {"0.heads": torch.tensor(row[: widths[0]]), "0.neurons": torch.tensor(row[widths[0] :])} for row in rows
        ]
    )
)


@given(pairs)
def test_the_distance_is_a_symmetric_metric_from_0_to_1(masks):
    a, b, c = masks[0], masks[1], masks[-1]
    assert unit_mask_distance(a, a) == 0.0
    assert unit_mask_distance(a, {key: ~value for key, value in a.items()}) == 1.0
    assert unit_mask_distance(a, b) == unit_mask_distance(b, a)
    assert 0 <= unit_mask_distance(a, c) <= unit_mask_distance(a, b) + unit_mask_distance(b, c) + 1e-12


def test_the_matrix_holds_every_pair():
    masks = [neurons(0), neurons(5), neurons(20)]
    expected = [[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]]
    assert torch.equal(distance_matrix(masks), torch.tensor(expected, dtype=torch.float64))
    assert distance_matrix([]).shape == (0, 0)


def test_it_does_not_settle_before_five_masks():
    for seen in range(5):
        made = history([3] * seen)
        assert not made.settled
        assert made.largest_distance is None
    assert history([3] * 5).settled


def test_it_settles_when_the_newest_is_near_each_of_the_last_four():
    # from one mask to the next the distance is never above 0.1 of 20 neurons, but to the oldest of five it is
    assert [history([0, 2, 4, 6, 8, 8, 8, 8, 8][:seen]).settled for seen in range(1, 10)] == [False] * 7 + [True] * 2
    assert history([0, 2, 4, 6, 8]).largest_distance == 0.4
    # exactly at the threshold counts; the sixth mask forgets the first
    assert history([8, 6, 7, 8, 7, 8]).largest_distance == 0.1
    assert history([8, 6, 7, 8, 7, 8]).settled
    assert not history([8, 6, 7, 8, 7, 9]).settled


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(2, 5), st.sampled_from([0.0, 0.1, 0.25]))
def test_it_fires_at_the_first_index_within_the_threshold(pruned, length, threshold):
    made = MaskHistory(length, threshold)
    for step, count in enumerate(pruned):
        made.add(step, neurons(count))
        window = pruned[max(0, step - length + 1) : step + 1]
        near = all(abs(count - other) / 20 <= threshold for other in window)
        assert made.settled == (len(window) == length and near)
        assert [kept for kept, _ in made.entries] == list(range(step + 1))[-length:]


def test_entries_continue_in_another_history_and_clear_forgets():
    made = history([3, 4, 4, 4])
    resumed = MaskHistory()
    for step, masks in made.entries:
        resumed.add(step, masks)
    resumed.add(10, neurons(4))
    assert resumed.settled
    assert [step for step, _ in resumed.entries] == [0, 1, 2, 3, 10]
    resumed.clear()
    assert resumed.entries == []
    assert not resumed.settled


def test_added_masks_are_copies():
    masks, made = neurons(3), MaskHistory(length=2)
    made.add(0, masks)
    masks["layer.0.neurons"].zero_()
    made.add(1, masks)
    assert made.largest_distance == 17 / 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit_mask_distance({"0.heads": mask("1")}, {"1.heads": mask("1")}), r"\['0.heads', '1.heads'\]"),
        (lambda: unit_mask_distance(neurons(1, 4), neurons(1, 5)), r"same shape, got \(4,\) and \(5,\)"),
        (lambda: MaskHistory(length=1), "`length` must be at least 2, got 1"),
        (lambda: MaskHistory(threshold=1.0), r"`threshold` must be in \[0, 1\), got 1.0"),
        (lambda: history([1]).add(0, neurons(1)), "`step` must be after the last one, 0, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
