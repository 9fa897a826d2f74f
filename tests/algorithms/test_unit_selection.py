import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_hf.algorithms.budgets import num_kept
from sparse_hf.algorithms.selection import keep_largest
from sparse_hf.algorithms.unit_selection import keep_counts, select_units, tied_at_cut


def layers(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def bits(masks):
    return ["".join(str(int(bit)) for bit in mask) for mask in masks]


def counts(masks):
    return [int(mask.sum()) for mask in masks]


def test_layers_alone_and_all_together_by_hand():
    scores = layers([5, 1, 2, 7], [6, 3, 8, 9])
    assert bits(select_units(scores, 0.5, "layer")) == ["1001", "0011"]
    assert bits(select_units(scores, 0.5, "global")) == ["0001", "1011"]


def test_bert_base_as_in_earlybert():
    heads, neurons = [torch.randn(12) for _ in range(12)], [torch.randn(3072) for _ in range(12)]
    assert counts(select_units(heads, 1 / 3, "layer")) == [8] * 12
    assert sum(counts(select_units(neurons, 0.4, "global"))) == round(12 * 3072 * 0.6)
    kept = counts(select_units(neurons, 0.4, "global", multiple_of=16))
    assert sum(kept) == 22112  # 22118 are 1382.4 blocks of 16
    assert all(count % 16 == 0 for count in kept)


@pytest.mark.parametrize(
    ("width", "fraction", "multiple_of", "kept"),
    [
        (12, 0.5, 4, 8),  # 6 is halfway between 4 and 8
        (12, 0.55, 4, 4),  # 5
        (12, 0.9, 4, 4),  # 1, but one block stays
        (12, 0.0, 5, 12),  # whole although no multiple: blocks of 5, 5, 2
        (12, 0.1, 5, 12),  # 11 is halfway between 10 and 12
        (12, 0.15, 5, 10),  # 10
        (3, 0.5, 16, 3),  # narrower than a block
    ],
)
def test_layer_counts_are_whole_blocks(width, fraction, multiple_of, kept):
    assert counts(select_units([torch.randn(width)], fraction, "layer", multiple_of)) == [kept]


def test_blocks_compete_by_their_mean():
    # blocks of 2: 9+1 (kept), 1+1, and 5+5 (kept), 4+3, 3 alone; 6 of 9 stay: 4+3 beats 1+1
    scores = layers([1, 9, 1, 1], [3, 5, 3, 5, 4])
    assert bits(select_units(scores, 1 / 3, "global", multiple_of=2)) == ["1100", "11011"]
    # 8 of 9 are nearest to 7 or 9: next is 3 alone, then 1+1, halfway, is taken
    assert bits(select_units(scores, 1 / 9, "global", multiple_of=2)) == ["1111", "11111"]


def test_ties_keep_the_lower_index_and_the_earlier_layer():
    scores = layers([1, 1, 1, 1], [1, 1, 1, 1])
    assert bits(select_units(scores, 0.5, "layer")) == ["1100", "1100"]
    assert bits(select_units(scores, 0.5, "global")) == ["1110", "1000"]
    assert bits(select_units(scores, 0.25, "global", multiple_of=2)) == ["1111", "1100"]
    assert bits(keep_counts(layers([0.0, -0.0, 0.0, -0.0]), [2])) == ["1100"]
    assert keep_counts([torch.zeros(5000)], [2500])[0].nonzero().flatten().tolist() == list(range(2500))


def test_no_layer_is_emptied():
    assert bits(select_units(layers([9, 8, 7], [1, 2, 0]), 2 / 3, "global")) == ["100", "010"]


def test_equal_doubles_whose_means_round_apart_stay_in_order():
    # (0.1 + 0.1 + 0.1) / 3 > 0.1 in fp64; the last block must not overtake those before it
    masks = select_units([torch.full((7,), 0.1, dtype=torch.float64)], 0.4, "global", multiple_of=3)
    assert bits(masks) == ["1110000"]  # 4 is nearer to 3 than to 6
    masks = select_units([-torch.full((8,), 0.1, dtype=torch.float64)], 0.4, "global", multiple_of=3)
    assert bits(masks) == ["11111100"]


small_scores = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=4)


@given(small_scores, st.floats(0, 0.95))
def test_single_units_are_the_exact_global_top_k(rows, fraction):
    scores = layers(*rows)
    num_keep = round(sum(map(len, rows)) * (1 - fraction))
    assume(num_keep >= len(rows))
    assert bits(select_units(scores, fraction, "global")) == bits(keep_largest(scores, num_keep))


@given(
    st.integers(1, 3).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(
                st.integers(1, 3).flatmap(
                    lambda blocks: st.lists(st.integers(-9, 9), min_size=blocks * size, max_size=blocks * size)
                ),
                min_size=1,
                max_size=3,
            ),
        )
    ),
    st.floats(0, 0.9),
)
def test_no_other_counts_of_whole_blocks_have_a_higher_sum(problem, fraction):
    size, rows = problem
    target = round(sum(map(len, rows)) * (1 - fraction))
    assume(target >= size * len(rows))
    masks = select_units(layers(*rows), fraction, "global", multiple_of=size)
    kept = counts(masks)
    assert abs(sum(kept) - target) <= size / 2
    assert all(count % size == 0 and count >= size for count in kept)
    ranked = [sorted(row, reverse=True) for row in rows]
    choices = itertools.product(*(range(size, len(row) + 1, size) for row in rows))
    sums = [
        sum(sum(row[:n]) for row, n in zip(ranked, choice, strict=True))
        for choice in choices
        if sum(choice) == sum(kept)
    ]
    assert sum(float(row[mask].sum()) for row, mask in zip(layers(*rows), masks, strict=True)) == max(sums)


@given(small_scores, st.floats(0, 0.6), st.integers(1, 5), st.sampled_from(["layer", "global"]))
def test_the_kept_are_the_best_of_their_layer_in_whole_blocks(rows, fraction, multiple_of, scope):
    scores = layers(*rows)
    first_blocks = sum(min(multiple_of, len(row)) for row in rows)
    assume(scope == "layer" or round(sum(map(len, rows)) * (1 - fraction)) >= first_blocks)
    assume(all(num_kept(len(row), fraction) for row in rows))  # else a layer would be emptied, which is refused
    masks = select_units(scores, fraction, scope, multiple_of)
    for score, mask in zip(scores, masks, strict=True):
        kept = int(mask.sum())
        assert kept % multiple_of == 0 or kept == score.numel()
        assert kept >= min(multiple_of, score.numel())
        assert mask.all() or score[mask].min() >= score[~mask].max()
    assert bits(keep_counts(scores, counts(masks))) == bits(masks)


def test_a_cut_through_equal_scores_is_tied():
    def tied(rows, fraction, scope):
        return tied_at_cut(layers(*rows), select_units(layers(*rows), fraction, scope), scope)

    assert tied([[1, 1, 1, 1]] * 2, 0.5, "layer")
    assert tied([[1, 1, 1, 1]] * 2, 0.5, "global")
    assert tied([[4, 3, 2, 1], [4, 2, 2, 1]], 0.5, "layer")
    assert not tied([[4, 3, 2, 1], [4, 4, 1, 1]], 0.5, "layer")  # equal scores on one side of the cut
    assert not tied([[1, 1, 1, 1]] * 2, 0.0, "global")  # nothing is pruned
    # the cut falls between two layers of equal scores: tied only where these compete
    assert tied([[2, 2], [2, 2], [2, 1]], 1 / 3, "global")
    rows = layers([9, 8], [9, 8])
    assert not tied_at_cut(rows, keep_counts(rows, [2, 1]), "layer")
    assert tied_at_cut(rows, keep_counts(rows, [2, 1]), "global")


def test_the_first_step_of_adamw_ties_and_a_coincidence_does_not():
    generator = torch.Generator().manual_seed(0)
    coefficients = 1 - 2e-5 * torch.randn(3072, generator=generator).sign()  # each moved by the learning rate
    assert tied_at_cut([coefficients], select_units([coefficients], 0.4, "global"), "global")

    scores = torch.arange(3072.0)
    scores[1000:1004] = 1000.0
    masks = keep_counts([scores], [3072 - 1002])
    assert not tied_at_cut([scores], masks, "layer")
    scores[1000:1040] = 1000.0
    assert tied_at_cut([scores], keep_counts([scores], [3072 - 1020]), "layer")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_units(layers([1, 2]), 1.0, "layer"), r"`fraction` must be in \[0, 1\), got 1.0"),
        (lambda: select_units(layers([1, 2]), float("nan"), "layer"), r"`fraction` must be in \[0, 1\), got nan"),
        (lambda: select_units(layers([1, 2]), 0.5, "model"), "one of 'layer', 'global', got 'model'"),
        (lambda: select_units(layers([1, 2]), 0.5, "layer", 0), "`multiple_of` must be at least 1, got 0"),
        (lambda: select_units(layers([1, 2], [1, torch.nan]), 0.5, "layer"), "got 1 NaN or infinite .* position 1"),
        (lambda: select_units(layers([1, -torch.inf]), 0.5, "global"), "`scores` must be finite"),
        (lambda: select_units(layers([1], []), 0.0, "global"), r"at least one unit .* shape \(0,\) at position 1"),
        (lambda: select_units([torch.ones(2, 2)], 0.0, "layer"), r"must be 1-D.* shape \(2, 2\) at position 0"),
        (lambda: select_units([torch.tensor([1, 2])], 0.0, "layer"), "floating .* got torch.int64"),
        (lambda: select_units(layers([1, 2, 3], [1]), 0.8, "layer"), "would empty a layer: position 1 with 1 units"),
        (lambda: select_units(layers([1] * 8, [1] * 8), 0.7, "global", 4), "together 8 units, got 0.7, which keeps 5"),
        (lambda: keep_counts(layers([1, 2]), [0]), r"`counts` must be in 1..2, the width, got 0 at position 0"),
        (lambda: keep_counts(layers([1, 2]), [3]), "got 3 at position 0"),
        (lambda: keep_counts(layers([1, 2]), [1, 1]), "one count per layer, got 2 for 1"),
        (lambda: tied_at_cut(layers([1, 2]), layers([1, 2]), "layer"), "`masks` must be bool"),
        (lambda: tied_at_cut(layers([1, 2]), [], "layer"), r"of the shapes \[\(2,\)\], got \[\]"),
        (lambda: tied_at_cut([], [], "heads"), "`scope` must be one of"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
