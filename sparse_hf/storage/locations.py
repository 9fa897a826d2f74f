"""Where are the files: a local folder or a repository on the Hub?"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError


def local_folder(
    name_or_path: str | Path,
    files: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder itself, or a local copy of the named files of a Hub repository.

    Args:
        name_or_path: a folder, or a Hub id such as "me/bert-sst2-ticket-60".
        files: the only files fetched; nothing else of a repository reaches this machine.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    try:
        fetched = snapshot_download(
            str(name_or_path), allow_patterns=list(files), revision=revision, token=token, cache_dir=cache_dir
        )
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"`{name_or_path}` is neither a folder here nor a Hub repository that could be reached "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})."
        ) from error
    return Path(fetched)


def hub_source(folder: Path) -> tuple[str, str | None]:
    """Which model at which commit a folder in the Hub's cache is a copy of: "org/name" and the commit.

    A folder elsewhere is itself: its path, without a commit.
    """
    cached, kind = folder.parent.parent, folder.parent.name
    if kind == "snapshots" and cached.name.startswith("models--"):
        return cached.name.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder.absolute()), None
