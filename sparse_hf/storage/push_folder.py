"""A folder goes to the Hub as one commit, after which no weights of an earlier push are left to be read by mistake."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects


CARD_FILE = "README.md"

# Files of weights that loaders look for at the top of a repository: those of a stock checkpoint with their shards,
# variants and indices, of these the safetensors without a variant, and ours.
STOCK_WEIGHTS = re.compile(r"(pytorch_)?model([.-].+)?\.(safetensors|bin)(\.index(\..+)?\.json)?")
STOCK_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
COMPRESSED_WEIGHTS = re.compile(r"compressed(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
    leave_out: Sequence[str] = (),
    revision: str | None = None,
) -> CommitInfo:
    """Create the repository if needed and upload the folder in one commit.

    The commit also deletes `outdated_weights`. (`HfApi.upload_folder` may split what it uploads into several commits.)

    Args:
        leave_out: patterns of paths that stay here.
        revision: branch; "main" by default.

    Raises:
        ValueError: the Hub would refuse the card's metadata; nothing was uploaded.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused it, or stayed out of reach after several attempts, or
            somebody else pushed in the instant before the commit. The repository is what it was.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = list(filter_repo_objects(files, ignore_patterns=[*leave_out, *DEFAULT_IGNORE_PATTERNS]))
    if CARD_FILE in names:
        ModelCard(files[CARD_FILE].read_text(encoding="utf-8")).validate()
    additions = [CommitOperationAdd(name, files[name]) for name in names]
    api.preupload_lfs_files(repo_id, additions, revision=revision)
    # What is there is looked at only now, as an upload can take hours; a commit that comes in between is noticed.
    parent = api.model_info(repo_id, revision=revision).sha
    there = [entry.path for entry in api.list_repo_tree(repo_id, revision=parent)]
    deletions = [CommitOperationDelete(name) for name in outdated_weights(names, there)]
    return api.create_commit(
        repo_id,
        [*deletions, *additions],
        commit_message=commit_message,
        revision=revision,
        parent_commit=parent,
    )


def delete_outdated_weights(
    repo_id: str, pushed: Iterable[str], token: str | bool | None, revision: str | None = None
) -> CommitInfo | None:
    """Delete `outdated_weights` that a push by somebody else left, in one commit; none if there is nothing to delete.

    Args:
        pushed: paths in the repository.
        revision: branch; "main" by default.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: as `push_folder`.
    """
    api = HfApi(token=token)
    parent = api.model_info(repo_id, revision=revision).sha
    there = [entry.path for entry in api.list_repo_tree(repo_id, revision=parent)]
    deletions = [CommitOperationDelete(name) for name in outdated_weights(pushed, there)]
    if not deletions:
        return None
    message = "Delete the weights that the last push replaced"
    return api.create_commit(repo_id, deletions, commit_message=message, revision=revision, parent_commit=parent)


def outdated_weights(pushed: Iterable[str], there: Iterable[str]) -> list[str]:
    """Weights in a repository that a loader could take for those that are being pushed; none if no weights are pushed.

    Beside a compressed checkpoint these are all other weights at the top of the repository, beside a dense one in
    safetensors the compressed ones and such safetensors as the stock loader would prefer or ignore: a dense variant
    (`model.fp16.safetensors`, `pytorch_model.bin`) is only read by who asks for it, and stays.

    Args:
        pushed: paths in the repository.
        there: paths in the repository before the push.
    """
    pushed = set(pushed)
    if any(map(COMPRESSED_WEIGHTS.fullmatch, pushed)):
        outdated = (STOCK_WEIGHTS, COMPRESSED_WEIGHTS)
    elif any(map(STOCK_SAFETENSORS.fullmatch, pushed)):
        outdated = (STOCK_SAFETENSORS, COMPRESSED_WEIGHTS)
    else:
        return []
    return sorted(
        name
        for name in set(there) - pushed
        if "/" not in name and any(pattern.fullmatch(name) for pattern in outdated)
    )
