"""Fewer experts: drop those that a dataset hardly uses, or merge them into those that it uses."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sparse_hf.moe.expert_average import weighted_mean
from sparse_hf.moe.expert_groups import Groups, most_similar, most_used
from sparse_hf.moe.new_checkpoint import read_origin, write_checkpoint
from sparse_hf.moe.plan_upcycling import COMPANIONS, SHARD_BYTES, WEIGHTS
from sparse_hf.moe.read_mixture import StoredLayer, StoredMixture, read_mixture
from sparse_hf.moe.usage import usage_of
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.pieces import CopyBytes, Piece
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import StoredTensor


def drop_experts(
    source: str | Path,
    destination: str | Path,
    usage: Mapping[int, Tensor],
    keep: int,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> bool:
    """Write the mixture with only the `keep` most used experts of each layer, in their old order.

    Their matrices, router rows and entries of the choice's bias are copied, in any dtype. All layers keep equally
    many, since a stock config has one number for all. Where the router never chose what is dropped the function stays,
    if the routing weights are renormalised over the chosen experts (`norm_topk_prob`, or a softmax over them); where
    it did, tokens go to their next best expert. Parts that an FFN was cut into are kept or dropped together, which is
    known from the `sparse_hf.json` beside the config. Reads, writes, resumes and completes the folder as `upcycle`
    does, in constant memory.

    Args:
        source: folder or Hub id of a mixture of one of the architectures in `read_mixture.TARGETS`.
        destination: a new folder.
        usage: per layer how much each expert is used, such as `expert_usage(...).counts` or `.weights`; of equally
            used experts the first is kept.
        keep: experts of the new mixture, not fewer than each token uses.
        max_shard_bytes: of one file.
        progress: show a bar.

    Returns:
        Whether the folder is complete; if not, other processes still write.

    Raises:
        FileNotFoundError: no such checkpoint, or a shard is missing.
        ValueError: `read_mixture` refuses it, or `usage` or `keep` do not fit it.
        FileExistsError: the destination holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """

    def alone(mixture: StoredMixture, layer: int, kept: list[int], parts: int) -> Groups:
        return tuple((expert,) for expert in kept)

    return _thin(source, destination, usage, keep, alone, max_shard_bytes, progress)


def merge_experts(
    source: str | Path,
    destination: str | Path,
    usage: Mapping[int, Tensor],
    groups: int,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> bool:
    """Write the mixture with `groups` experts per layer: the most used, each merged with those most like it.

    In the manner of M-SMoE (Li et al. 2024, arXiv 2310.01334): the most used experts stay, each other one joins the
    one that is chosen most alike, and a group's matrices are averaged, weighted by `usage`; those of a group that is
    not used at all by a plain mean. Alike is judged by the cosine of router rows, from which the layer's mean row is
    taken first: it adds the same to all logits, which a softmax does not see. Rows are small and need no data, and
    experts chosen for like tokens are those whose work the merged one must do. Ties go to the first.

    Where we differ from the paper: it aligns the neurons of experts by permutation before it averages them; we do not,
    since experts upcycled from one FFN begin aligned. Experts trained apart from random weights are not, and are
    better dropped. It groups by how tokens of a dataset are routed, we by the router's rows. All our layers keep
    equally many experts, since a stock config has one number for all. Of a group only the kept expert's router row
    stays (and its entry of the choice's bias), so a token that would have chosen another member may choose another
    group. The paper's further compression of the merged experts is not done.

    Everything else is as in `drop_experts`. Parts that FFNs were cut into are merged with the same part of other
    copies.

    Raises:
        ValueError: as in `drop_experts`; or experts that differ are in a dtype that is only copied.
    """
    return _thin(source, destination, usage, groups, most_similar, max_shard_bytes, progress)


def _thin(
    source: str | Path,
    destination: str | Path,
    usage: Mapping[int, Tensor],
    keep: int,
    group: Callable[[StoredMixture, int, list[int], int], Groups],
    max_shard_bytes: int,
    progress: bool,
) -> bool:
    folder = local_folder(source, ["config.json", "sparse_hf.json", *WEIGHTS, *COMPANIONS])
    mixture, origin = read_mixture(folder), read_origin(folder)
    parts = _parts_per_copy(mixture, origin)
    if 1 < parts == mixture.experts and group is most_similar:
        raise ValueError("The experts are the parts of one FFN, which have nothing in common to average: drop them.")
    parts = parts if parts < mixture.experts else 1  # of one copy alone parts are chosen one by one
    _check_keep(mixture, keep, parts)
    used = usage_of(mixture, usage)
    kept = {layer: most_used(values, keep, parts) for layer, values in used.items()}
    groups = {layer: group(mixture, layer, kept[layer], parts) for layer in mixture.layers}
    description = {"kind": "thinned_mixture", **origin, "experts": keep, "top_k": mixture.top_k}
    return write_checkpoint(
        folder,
        Path(destination),
        _plan(mixture, groups, used),
        _with_count(mixture, keep),
        description,
        max_shard_bytes,
        progress,
    )


def _parts_per_copy(mixture: StoredMixture, origin: Mapping[str, object]) -> int:
    """How many neighbouring experts are parts of one copy; 1 where each is a whole."""
    parts = origin.get("init", {}).get("granularity", 1)
    if parts < 1 or mixture.experts % parts:
        raise ValueError(f"`granularity` in sparse_hf.json must divide the {mixture.experts} experts, got {parts}.")
    return parts


def _check_keep(mixture: StoredMixture, keep: int, parts: int) -> None:
    if type(keep) is not int or not mixture.top_k <= keep <= mixture.experts:
        raise ValueError(
            f"The experts to keep must be between the {mixture.top_k} that each token uses and the {mixture.experts} "
            f"there are, got {keep!r}."
        )
    if keep % parts:
        raise ValueError(f"The experts are copies in {parts} parts: keep a multiple of {parts}, got {keep}.")
    if (limit := getattr(mixture.config, "n_group", None)) is not None and (limit != 1 or keep < 2):
        raise ValueError(
            f"The router of {mixture.target.model_type} ranks groups of experts by their best two: it must have one "
            f"group of 2 or more, got `n_group` = {limit} and {keep} experts to keep."
        )


def _plan(
    mixture: StoredMixture, groups: Mapping[int, Groups], used: Mapping[int, list[float]]
) -> list[PlannedTensor]:
    """Every tensor in the order of the source, the mixtures with fewer experts."""
    owner = {name: layer for layer, one in mixture.layers.items() for name in one.routed_names()}
    planned, done = [], set()
    for name, stored in mixture.headers.items():
        if name not in owner:
            planned.append(PlannedTensor(name, stored.dtype, stored.shape, (_copy(stored),)))
        elif (layer := owner[name]) not in done:
            done.add(layer)
            planned += _routing(mixture, layer, [members[0] for members in groups[layer]])
            planned += _experts(mixture, layer, groups[layer], used[layer])
    return planned


def _routing(mixture: StoredMixture, layer: int, kept: Sequence[int]) -> list[PlannedTensor]:
    """The router's rows of the kept experts, and their entries of what stands beside it."""
    one: StoredLayer = mixture.layers[layer]
    pieces = tuple(_copy(one.router.rows(expert, 1)) for expert in kept)
    planned = [PlannedTensor(one.router.name, one.router.dtype, (len(kept), *one.router.shape[1:]), pieces)]
    for template, stored in one.beside.items():
        sizes = mixture.target.zeros[template]
        shape = tuple(len(kept) if size == "experts" else old for size, old in zip(sizes, stored.shape, strict=True))
        pieces = (_copy(stored),)
        if "experts" in sizes:  # (experts,) or (1, experts): one number each, one after the other
            size = stored.length // mixture.experts
            pieces = tuple(CopyBytes(stored.file, stored.offset + expert * size, size) for expert in kept)
        planned.append(PlannedTensor(stored.name, stored.dtype, shape, pieces))
    return planned


def _experts(mixture: StoredMixture, layer: int, groups: Groups, used: Sequence[float]) -> list[PlannedTensor]:
    experts, planned = mixture.layers[layer].experts, []
    for template, matrices in mixture.target.experts.items():
        first = [experts[0][matrix] for matrix in matrices]
        shape = (sum(stored.shape[0] for stored in first), *first[0].shape[1:])
        made: list[tuple[Piece, ...]] = [
            tuple(
                weighted_mean([experts[one][matrix] for one in members], [used[one] for one in members])
                for matrix in matrices
            )
            for members in groups
        ]
        if "{expert}" in template:
            names = [template.format(layer=layer, expert=number) for number in range(len(groups))]
            planned += [PlannedTensor(name, first[0].dtype, shape, one) for name, one in zip(names, made, strict=True)]
        else:
            together = tuple(piece for one in made for piece in one)
            name = template.format(layer=layer)
            planned.append(PlannedTensor(name, first[0].dtype, (len(groups), *shape), together))
    return planned


def _copy(stored: StoredTensor) -> CopyBytes:
    return CopyBytes(stored.file, stored.offset, stored.length)


def _with_count(mixture: StoredMixture, keep: int) -> dict[str, object]:
    """The config as it stands in the source, with another number of experts, by whichever name it has there."""
    entries, count = read_json(mixture.folder / "config.json"), mixture.target.count
    aliases = {name for pair in type(mixture.config).attribute_map.items() if count in pair for name in pair}
    names = ({count} | aliases) & entries.keys() or {count}
    return {**entries, **dict.fromkeys(names, keep)}
