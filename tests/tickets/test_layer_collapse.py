"""A global threshold that cuts a matrix off is said, since training under it cannot tell."""

import torch

from sparse_hf import prune
from tiny_models import tiny_model


def small_pooler():
    torch.manual_seed(0)
    model = tiny_model("bert", head="sequence_classification")
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(0.01)
    return model


def test_a_matrix_of_small_weights_is_named(caplog):
    prune(small_pooler(), 0.6)
    assert "Layer collapse: `pooler.dense.weight` keeps" in caplog.text
    assert "where 0.4 stay over all" in caplog.text


def test_excluded_or_with_a_density_of_its_own_it_is_not(caplog):
    prune(small_pooler(), 0.6, exclude="pooler.*")
    prune(small_pooler(), 0.6, budget="uniform")
    assert "Layer collapse" not in caplog.text
