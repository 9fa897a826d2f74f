"""A folder goes to the Hub, with a card that says what is in it."""

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from sparse_hf.cards.card import CARD_FILE, is_generated, write_card
from sparse_hf.storage.compressed_checkpoint import is_compressed
from sparse_hf.storage.compressed_folder import compressed_copy
from sparse_hf.storage.push_folder import push_folder


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload by sparse_hf",
    compressed: bool | Literal["zstd"] = False,
) -> str:
    """Upload the folder of a model, ticket or adapter with a model card, and create the repository if needed.

    The card is written into the folder by `write_card`. A card that a person wrote, there or in the repository, stays.
    Everything is one commit, which also deletes weights of an earlier push that would be read by mistake: those of the
    dense checkpoint beside a compressed one, and the other way around.

    Args:
        folder: with everything that belongs to the model; subfolders go along.
        repo_id: such as "me/bert-sst2-60".
        private: visibility of a new repository.
        compressed: upload what `save_compressed` makes of the folder, which stays as it is and gets no card. What is
            uploaded is first written to the system's folder for temporary files (`TMPDIR`). "zstd": values coded too.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: see `inspect` and `save_compressed`; nothing was uploaded.
        OSError: the disk is full or not writable; nothing was uploaded.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused it, or stayed out of reach after several attempts.
    """
    folder = Path(folder)
    if compressed and not is_compressed(folder):
        with compressed_copy(folder, compressed == "zstd") as small:
            return publish(small, repo_id, private, token, commit_message)
    repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_card(folder, repo_id, token=token)
    leave_out = [CARD_FILE] if _has_a_persons_card(repo_id, token) else []
    return push_folder(folder, repo_id, private, token, commit_message, leave_out).commit_url


def _has_a_persons_card(repo_id: str, token: str | bool | None) -> bool:
    try:
        path = Path(hf_hub_download(repo_id, CARD_FILE, token=token))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return False
    return not is_generated(path.read_text(encoding="utf-8", errors="replace"))
