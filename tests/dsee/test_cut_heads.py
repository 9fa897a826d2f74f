"""Are heads scored by their update, cut for real, and the adapter carried over?"""

import pytest
import torch
from peft import get_peft_model

from sparse_hf import DseeConfig, cut_heads, heads_by_update
from sparse_hf.anatomy.units import find_units
from sparse_hf.dsee.masks import adapted_layers
from tiny_models import tiny_model


TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


def adapted(family, **options):
    pad = {} if family == "bert" else {"pad_token_id": 0}
    model = tiny_model(family, "sequence_classification", num_attention_heads=4, **pad).eval()
    targets = {"target_modules": TARGETS[family], "task_type": "SEQ_CLS", "init_weights": False}
    return get_peft_model(model, DseeConfig(**{"r": 2, "nnz": 6, **targets, **options})).eval()


def logits(model):
    return model(input_ids=torch.arange(5, 12)[None]).logits


def heads_of(model):
    return [one.count for one in find_units(model) if one.kind == "heads"]


def test_scores_by_hand():
    """BERT: rows 4 h to 4 h + 4 of query and of value belong to head h."""
    model = adapted("bert")
    layers = adapted_layers(model.get_base_model(), "default")
    found = heads_by_update(model)
    for number in range(2):
        rows = torch.zeros(4)
        for name in ("query", "value"):
            update = layers[f"bert.encoder.layer.{number}.attention.self.{name}"].get_delta_weight("default").detach()
            rows += update.abs().view(4, -1).sum(1)
        torch.testing.assert_close(found[f"encoder.layer.{number}.heads"], rows)


@pytest.mark.parametrize("family", TARGETS)
def test_heads_that_do_nothing_are_cut_without_a_trace(family):
    """With no update and no output of the cut heads, the smaller model computes the same."""
    model = adapted(family, nnz=0)
    scores = heads_by_update(model)
    layers = adapted_layers(model.get_base_model(), "default")
    outputs = {"bert": "attention.output.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}[family]
    base = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for key, score in scores.items():
            count = score.numel()
            worst = score.argsort()[: count // 2].tolist()
            module = next(
                one for name, one in base.items() if name.endswith(f"{key.removesuffix('.heads')}.{outputs}")
            )
            weight = module.weight if family != "gpt2" else module.weight.t()
            for head in worst:
                weight.view(weight.shape[0], count, -1)[:, head] = 0
    assert layers
    before = logits(model)
    smaller = cut_heads(model, 0.5)
    assert heads_of(smaller.get_base_model()) == [score.numel() // 2 for score in scores.values()]
    torch.testing.assert_close(logits(smaller), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TARGETS)
def test_the_adapter_is_carried_over(family, tmp_path):
    model = adapted(family, nnz=6, base_sparsity=0.25)
    before = {
        name: dict(zip(layer.sparse_hf_dsee_values["default"].tolist(), [0] * 6, strict=False))
        for name, layer in adapted_layers(model.get_base_model(), "default").items()
    }
    zeros = {n: one.weight == 0 for n, one in adapted_layers(model.get_base_model(), "default").items()}
    smaller = cut_heads(model, 0.5)
    carried = 0
    for name, layer in adapted_layers(smaller.get_base_model(), "default").items():
        values = layer.sparse_hf_dsee_values["default"].tolist()
        assert len(values) == 6
        kept = [value for value in values if value != 0]
        assert set(kept) <= before[name].keys()
        carried += len(kept)
        assert 0 < (layer.weight == 0).sum() < zeros[name].sum()
        assert layer.frozen_weight().count_nonzero() > layer.weight.count_nonzero()
    assert 0 < carried < 6 * len(before)
    loss = smaller(input_ids=torch.arange(5, 12)[None], labels=torch.tensor([1])).loss
    loss.backward()
    trained = {name for name, one in smaller.named_parameters() if one.grad is not None}
    assert trained == {name for name, one in smaller.named_parameters() if one.requires_grad}


def test_refused():
    model = adapted("bert", target_modules=["intermediate.dense"])
    with pytest.raises(ValueError, match="none of them is tuned"):
        heads_by_update(model)
    model = adapted("bert")
    with pytest.raises(ValueError, match="at least one unit"):
        cut_heads(model, 0.99)
    model.add_adapter("other", DseeConfig(r=2, nnz=0, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="one adapter, got default, other"):
        cut_heads(model, 0.5)
