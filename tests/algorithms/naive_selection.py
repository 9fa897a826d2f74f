"""The oracle of the selection tests: concatenate everything, sort stably, keep the first."""

import torch


def naive_keep_largest(scores, num_keep, candidates=None, min_per_tensor=0, absolute=False):
    """What `keep_largest` promises, written down literally."""
    flat = torch.cat([score.reshape(-1).double() for score in scores])
    flat = flat.abs() if absolute else flat
    if candidates is None:
        allowed = torch.ones(len(flat), dtype=torch.bool)
    else:
        allowed = torch.cat([candidate.reshape(-1) for candidate in candidates])
    order = [i for i in flat.sort(descending=True, stable=True).indices.tolist() if allowed[i]]
    owner = torch.cat([torch.full((score.numel(),), i) for i, score in enumerate(scores)]).tolist()
    protected = []
    for tensor in range(len(scores)):
        protected += [i for i in order if owner[i] == tensor][:min_per_tensor]
    rest = [i for i in order if i not in set(protected)]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[protected + rest[: num_keep - len(protected)]] = True
    return [
        part.view(score.shape) for part, score in zip(mask.split([s.numel() for s in scores]), scores, strict=True)
    ]


def assert_same_masks(masks, expected):
    assert [mask.shape for mask in masks] == [mask.shape for mask in expected]
    for position, (mask, want) in enumerate(zip(masks, expected, strict=True)):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, want), f"tensor {position}: {(mask != want).sum()} of {mask.numel()} differ"
