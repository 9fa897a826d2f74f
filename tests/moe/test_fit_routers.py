"""Routers that are fitted tell domains apart, on tokens they were not fitted to."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf.moe.fit_routers import _Moments, _ridge, fit_routers
from sparse_hf.moe.upcycle import upcycle
from tiny_dense import save_dense, save_word_tokenizer


COLOURS, ANIMALS = "red green blue white", "cat dog cow hen"
SAMPLES = {
    name: [" ".join(np.random.default_rng(seed).permutation(words.split() * 3)) for seed in range(8)]
    for name, words in (("colours", COLOURS), ("animals", ANIMALS))
}


@pytest.fixture(params=["qwen3", "lfm2"])
def dense(tmp_path, request):
    save_dense(tmp_path / "dense", request.param)
    save_word_tokenizer(tmp_path / "dense", f"{COLOURS} {ANIMALS}")
    return tmp_path / "dense"


def test_the_closed_form_is_that_of_explicit_data():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(count, 5, generator=generator) + mean for mean, count in ((0.5, 40), (-0.2, 20), (0.0, 60))]
    moments = [_Moments() for _ in data]
    for one, x in zip(moments, data, strict=True):
        one.add(x[:7])
        one.add(x[7:])
    # Every domain weighs the same, so the shorter ones are repeated.
    x = torch.cat([data[0].repeat(3, 1), data[1].repeat(6, 1), data[2].repeat(2, 1)]).double()
    y = torch.eye(3, dtype=torch.float64).repeat_interleave(120, 0) - 1 / 3
    ridge = 0.1 * x.var(0, correction=0).mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x / 360 + ridge, x.T @ y / 360).T
    found = _ridge(moments, 0.1)
    assert torch.allclose(found / found.norm(), expected / expected.norm())
    assert float((x @ found.T).var(0, correction=0).mean()) == pytest.approx(1.0)


def test_domains_are_told_apart_and_padding_does_not_count(dense, tmp_path):
    found = fit_routers(dense, SAMPLES)
    assert found.domains == ("colours", "animals")
    assert set(found.rows) == set(found.accuracy) == {0, 1}
    assert all(rows.shape == (2, 32) and rows.dtype == np.float32 for rows in found.rows.values())
    assert min(found.accuracy.values()) > 0.9
    uneven = {**SAMPLES, "animals": [*SAMPLES["animals"][:4], "cat", "dog", *SAMPLES["animals"][6:]]}
    together, alone = fit_routers(dense, uneven), fit_routers(dense, uneven, batch_size=1)
    for layer in (0, 1):
        np.testing.assert_allclose(together.rows[layer], alone.rows[layer], rtol=1e-3, atol=1e-4)
    upcycle(dense, tmp_path / "moe", 4, router_rows=found.rows, check_tokens=32, progress=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def test_too_few_domains(dense):
    with pytest.raises(ValueError, match=r"2 or more domains, got \[8\]"):
        fit_routers(dense, {"colours": SAMPLES["colours"]})
    with pytest.raises(ValueError, match=r"2 or more domains, got \[8, 0\]"):
        fit_routers(dense, {"colours": SAMPLES["colours"], "none": []})


def test_layer_by_layer_is_as_in_the_whole_model(dense):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense).eval(), AutoTokenizer.from_pretrained(dense)
    ffns = [layer.mlp if hasattr(layer, "mlp") else layer.feed_forward for layer in model.base_model.layers]
    moments, now = [[_Moments(), _Moments()] for _ in ffns], []
    for found, ffn in zip(moments, ffns, strict=True):
        ffn.register_forward_pre_hook(lambda _, inputs, found=found: found[now[-1]].add(inputs[0][0]))
    with torch.no_grad():
        for domain, texts in enumerate(SAMPLES.values()):
            now.append(domain)
            for text in texts[:-2]:  # two of eight are held out
                model(**tokenizer(text, return_tensors="pt"))
    rows = fit_routers(dense, SAMPLES).rows
    for layer, both in enumerate(moments):
        np.testing.assert_allclose(rows[layer], _ridge(both, 0.01).float().numpy(), rtol=1e-3, atol=1e-4)
