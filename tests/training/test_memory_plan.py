"""The plan of a training's memory, by hand, and beside what the mask keeper holds."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import find_sites, plan_memory
from sparse_hf.algorithms.selection_sums import bytes_of_selection
from sparse_hf.training.memory_plan import STRATEGIES


# Per layer 4 * 8 * 8 in attention and 3 * 8 * 12 in the FFN, twice; embeddings and head of 10 * 8 each; norms of 8.
MASKED = 2 * (4 * 64 + 3 * 96)
WEIGHTS = MASKED + 2 * 80 + 5 * 8


@pytest.fixture(scope="module")
def model():
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=10, tie_word_embeddings=False, **shape))


def test_ddp_holds_everything_everywhere(model):
    plan = plan_memory(model, "ddp", 4)
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * WEIGHTS, 8 * WEIGHTS, 8 * WEIGHTS)
    assert (plan.masks, plan.mask_update) == (MASKED, 2 * MASKED)
    assert (plan.sums_sent, plan.weights_sent) == (0, 0)  # every rank draws the same masks by itself
    assert plan.total == 20 * WEIGHTS + MASKED


def test_fsdp2_cuts_rows_and_the_first_rank_has_most(model):
    plan = plan_memory(model, "fsdp2", 3)
    rows = {8: 3, 12: 4, 10: 4}  # of three ranks the first one's
    masked = 2 * (4 * rows[8] * 8 + 2 * rows[12] * 8 + rows[8] * 12)
    held = masked + 2 * rows[10] * 8 + 5 * rows[8]
    assert (plan.weights, plan.gradients, plan.optimizer, plan.masks) == (4 * held, 4 * held, 8 * held, masked)
    numels = [math.prod(site.shape) for site in find_sites(model)]
    assert len(numels) == 14
    # A count per matrix to look for layer collapse, and one for the sparsity reached.
    assert plan.sums_sent == round(4 / 3 * (bytes_of_selection(numels) + 8 * 15))
    assert plan.gather_instead == round(2 / 3 * 4 * MASKED)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_keep_copies_whole_and_send_them_when_masks_change(model, stage):
    plan = plan_memory(model, f"zero{stage}", 2)
    share = WEIGHTS // 2
    assert (plan.weights, plan.optimizer, plan.masks) == (2 * WEIGHTS, 12 * share, min(share, MASKED))
    assert plan.gradients == 6 * share  # with two ranks more than the whole bf16 ones of stage 1
    assert plan.weights_sent == WEIGHTS
    assert plan_memory(model, f"zero{stage}", 8).gradients == (2 * WEIGHTS if stage == 1 else 6 * -(-WEIGHTS // 8))


def test_zero_3_cuts_everything_in_runs(model):
    plan = plan_memory(model, "zero3", 2, precision="fp32")
    share = WEIGHTS // 2  # all sizes are even
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * share, 8 * share, 12 * share)
    assert (plan.masks, plan.weights_sent) == (MASKED // 2, 0)


def test_matrix_by_matrix_is_a_selection_each(model):
    together, each = (plan_memory(model, "fsdp2", 2, budget=budget).sums_sent for budget in ("global", "uniform"))
    numels = [math.prod(site.shape) for site in find_sites(model)]
    assert each == sum(bytes_of_selection([numel]) for numel in numels) + 8 * (2 * 14 + 1)
    assert each > 10 * together


def test_what_is_excluded_has_no_mask(model):
    plan = plan_memory(model, "ddp", 1, exclude="*mlp*")
    assert plan.masks == 2 * 4 * 64


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_never_hold_more(model, strategy):
    totals = [plan_memory(model, strategy, processes).total for processes in (1, 2, 3, 8, 64)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_scalar_counts_as_one_weight(model, strategy):
    """As CLIP's scale of logits is one."""
    with_scalar = nn.Module()
    with_scalar.model, with_scalar.scale = model, nn.Parameter(torch.tensor(1.0))
    plain, one_more = plan_memory(model, strategy, 1), plan_memory(with_scalar, strategy, 1)
    assert one_more.optimizer - plain.optimizer == plain.optimizer // WEIGHTS


def test_bad_input(model):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_memory(model, "ddp", 0)
    with pytest.raises(ValueError, match="Unknown strategy 'zero4'"):
        plan_memory(model, "zero4", 2)
    with pytest.raises(ValueError, match="Unknown precision 'fp16'"):
        plan_memory(model, "ddp", 2, precision="fp16")
