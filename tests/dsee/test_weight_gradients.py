"""Are the gradients at candidates those of the dense weight, and does S2 go where they are largest?"""

import pytest
import torch
from peft import get_peft_model

from sparse_hf import DseeConfig, support_by_gradient
from sparse_hf.dsee.masks import adapted_layers
from sparse_hf.dsee.weight_gradients import CandidateGradients
from tiny_models import tiny_model


MODELS = {"bert": ["query", "dense"], "gpt2": ["c_attn"]}


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (3, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": torch.tensor([0, 1, 0])} for one in ids]


def classifier(family):
    return tiny_model(family, "sequence_classification", **({"pad_token_id": 0} if family == "gpt2" else {})).eval()


def dense_gradients(family):
    """Of every weight of the stock model, summed over the batches."""
    model = classifier(family)
    for batch in batches():
        model(**batch).loss.backward()
    return {name.removesuffix(".weight"): one.grad for name, one in model.named_parameters() if one.grad is not None}


def adapted(family, **options):
    config = DseeConfig(**{"r": 2, "nnz": 5, "target_modules": MODELS[family], "task_type": "SEQ_CLS", **options})
    return get_peft_model(classifier(family), config).eval()


@pytest.mark.parametrize("family", MODELS)
def test_candidates_have_the_dense_gradient(family):
    model, dense = adapted(family), dense_gradients(family)
    layers = adapted_layers(model.base_model.model, "default")
    watching = CandidateGradients(layers, {name: torch.arange(1, 40, 3) for name in layers})
    watching.start()
    for batch in batches():
        model(**batch).loss.backward()
    sums = watching.stop()
    model(**batches()[0]).loss.backward()  # not watched any more
    assert sums.keys() == layers.keys()
    for name, found in sums.items():
        torch.testing.assert_close(found, dense[name].flatten()[1:40:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_the_largest_gradients(family):
    model, dense = adapted(family), dense_gradients(family)
    support_by_gradient(model, batches())
    for name, layer in adapted_layers(model.base_model.model, "default").items():
        chosen = layer.sparse_hf_dsee_indices["default"].long()
        assert chosen.numel() == 5
        sizes = dense[name].flatten().abs()
        others = torch.ones_like(sizes, dtype=torch.bool)
        others[chosen] = False
        assert sizes[chosen].min() >= sizes[others].max() * (1 - 1e-4), name
    assert all(one.grad is None for one in model.parameters())


def test_refused():
    with pytest.raises(ValueError, match="no DSEE adapter `default` with `nnz` above 0"):
        support_by_gradient(adapted("bert", nnz=0), batches())
    with pytest.raises(ValueError, match="at least one batch, got none"):
        support_by_gradient(adapted("bert"), [])
    with pytest.raises(ValueError, match="has been trained"):
        support_by_gradient(adapted("bert", init_weights=False), batches())
