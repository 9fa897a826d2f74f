"""Draws on real (tiny) models: exact counts, nested masks, every score and budget."""

import pytest
import torch

from sparse_hf.algorithms.budgets import erdos_renyi_budget, num_kept, uniform_budget
from sparse_hf.anatomy import find_sites, named_canonical_parameters
from sparse_hf.tickets.draw import draw_masks
from tiny_models import tiny_model


MODELS = {
    family: tiny_model(family, head)
    for family, head in [("bert", "sequence_classification"), ("gpt2", "causal_lm"), ("mixtral", "causal_lm")]
}
BUDGETS = ["global", "uniform", "erdos_renyi", "erdos_renyi_kernel"]


def sites_and_parameters(family, **patterns):
    return find_sites(MODELS[family], **patterns), named_canonical_parameters(MODELS[family])


def draw(family, sparsity, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(*sites_and_parameters(family), sparsity, generator=generator, **options)


def gradients_of(family):
    generator = torch.Generator().manual_seed(5)
    _, parameters = sites_and_parameters(family)
    return {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def kept_per_site(family, masks):
    return [int(site.part(masks[site.parameter]).sum()) for site in find_sites(MODELS[family])]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sparsity", [0.0, 1 / 3, 0.9])
def test_count_is_exact(family, budget, sparsity):
    sites, parameters = sites_and_parameters(family)
    masks = draw(family, sparsity, budget=budget)
    numel = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == num_kept(numel, sparsity)
    assert {name: mask.shape for name, mask in masks.items()} == {
        site.parameter: parameters[site.parameter].shape for site in sites
    }


@pytest.mark.parametrize("family", MODELS)
def test_count_per_site_is_that_of_the_budget(family):
    sites, _ = sites_and_parameters(family)
    shapes = [site.shape for site in sites]
    numels = [rows * columns for rows, columns in shapes]
    keep = num_kept(sum(numels), 0.8)
    assert kept_per_site(family, draw(family, 0.8, budget="uniform")) == uniform_budget(numels, keep)
    assert kept_per_site(family, draw(family, 0.8, budget="erdos_renyi")) == erdos_renyi_budget(shapes, keep)


@pytest.mark.parametrize("family", MODELS)
def test_global_magnitude_has_one_threshold(family):
    sites, parameters = sites_and_parameters(family)
    masks = draw(family, 0.7)
    pairs = [
        (site.part(parameters[site.parameter].detach()).abs(), site.part(masks[site.parameter])) for site in sites
    ]
    kept = torch.cat([weight[mask] for weight, mask in pairs])
    pruned = torch.cat([weight[~mask] for weight, mask in pairs])
    assert pruned.max() <= kept.min()
    assert len({round(float(mask.float().mean()), 3) for _, mask in pairs}) > 1


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("score", ["magnitude", "gradient", "random"])
def test_masks_are_nested_across_rounds(family, budget, score):
    masks = None
    for number, sparsity in enumerate([0.2, 0.5, 0.8]):
        previous = masks
        options = {"score": score, "budget": budget, "seed": number, "gradients": gradients_of(family)}
        masks = draw(family, sparsity, previous=previous, **options)
        numel = sum(mask.numel() for mask in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == num_kept(numel, sparsity)
        if previous is not None:
            assert not any((mask & ~previous[name]).any() for name, mask in masks.items())


def test_nested_masks_cannot_grow():
    previous = draw("bert", 0.5)
    with pytest.raises(ValueError, match="nested in earlier ones can only lose weights"):
        draw("bert", 0.4, previous=previous)


def test_experts_that_are_no_site_stay_dense():
    excluded = find_sites(MODELS["mixtral"], include="*experts*[1]")
    sites, parameters = sites_and_parameters("mixtral", exclude="*experts*[1]")
    masks = draw_masks(sites, parameters, 0.9)
    assert all(site.part(masks[site.parameter]).all() for site in excluded)
    numel = sum(rows * columns for rows, columns in (site.shape for site in sites))
    assert sum(int(site.part(masks[site.parameter]).sum()) for site in sites) == num_kept(numel, 0.9)


def test_gradient_score_is_weight_times_gradient():
    sites, parameters = sites_and_parameters("gpt2")
    gradients = gradients_of("gpt2")
    masks = draw("gpt2", 0.6, score="gradient", gradients=gradients)
    scores = {
        site.parameter: (parameters[site.parameter].detach() * gradients[site.parameter]).abs() for site in sites
    }
    assert max(scores[name][~mask].max() for name, mask in masks.items()) <= min(
        scores[name][mask].min() for name, mask in masks.items()
    )


def test_random_score_depends_on_the_seed_alone():
    first, again, other = (draw("bert", 0.5, seed=seed, score="random") for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("budget", BUDGETS)
def test_nan_is_refused_by_name(budget):
    sites, parameters = sites_and_parameters("bert")
    name = "encoder.layer.1.output.dense.weight"
    broken = dict(parameters) | {name: parameters[name].detach().clone()}
    broken[name][3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinity in `{name}`"):
        draw_masks(sites, broken, 0.5, budget=budget)


def test_min_kept_per_site():
    sites, parameters = sites_and_parameters("bert")
    tiny = {name: p.detach() * (1e-6 if name == "pooler.dense.weight" else 1) for name, p in parameters.items()}
    for minimum in (0, 1, 7):
        masks = draw_masks(sites, tiny, 0.9, min_kept_per_site=minimum)
        assert int(masks["pooler.dense.weight"].sum()) == minimum


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score": "movement"}, "Unknown score 'movement'. Choose one of: magnitude, gradient, random"),
        ({"budget": "erk"}, "Unknown budget 'erk'. Choose one of: global"),
        ({"score": "gradient"}, "score='gradient' needs gradients, `encoder.layer.0.attention.self.query.weight` has"),
        ({"score": "gradient", "gradients": {}}, "score='gradient' needs gradients"),
        ({"score": "random"}, "needs a `generator`"),
        ({"sparsity": 1.0}, "must be in"),
        ({"sparsity": float("nan")}, "must be in"),
    ],
)
def test_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        draw_masks(*sites_and_parameters("bert"), **{"sparsity": 0.5, **options})
