"""The folder of a ticket: what is in it, and what reads it?"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from sparse_hf.cards.card import CARD_FILE, PICTURE_FILE, is_generated
from sparse_hf.cards.publish import publish
from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.durable import write_folder
from sparse_hf.storage.file_names import DESCRIPTION_FILE, UNITS_FILE
from sparse_hf.storage.mask_file import MASKS_FILE


# The file of masks -> the `kind` its description says, in words, what reads it.
READERS = {
    MASKS_FILE: ("ticket", "a ticket of single weights", "Ticket.from_pretrained"),
    UNITS_FILE: ("structured_ticket", "a structured ticket", "StructuredTicket.from_pretrained"),
}


def write_ticket_folder(folder: Path, masks_file: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, or one that replaces an older ticket with the same `masks_file` as a whole.

    A card that a program wrote goes with the older ticket.

    Raises:
        FileExistsError: the folder holds something else than such a ticket, or is a file.
        OSError: the disk is full or not writable; an older ticket survives.
    """
    entries = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    card = folder / CARD_FILE
    written = {CARD_FILE} if card.is_file() and is_generated(card.read_text(encoding="utf-8")) else set()
    strangers = sorted(entries - {masks_file, DESCRIPTION_FILE, PICTURE_FILE} - written)
    if strangers or (folder.exists() and not folder.is_dir()):
        found = repr(strangers[0]) if strangers else "a file"
        raise FileExistsError(f"`{folder}` must be new or hold an older ticket, found {found}. Choose another folder.")
    write_folder(folder, write)


def push_ticket(
    save: Callable[[Path], object], repo_id: str, private: bool | None, token: str | bool | None, commit_message: str
) -> str:
    """Upload what `save` writes into a folder, with a card, creating the repository if needed.

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ticket"
        save(folder)
        return publish(folder, repo_id, private, token, commit_message)


def find_masks_file(folder: Path, masks_file: str) -> Path:
    """`folder / masks_file`, which is there.

    Raises:
        FileNotFoundError: it is not there, nor is another kind of ticket.
        ValueError: the folder holds the other kind of ticket; the message says what reads it.
    """
    if (folder / masks_file).is_file():
        return folder / masks_file
    description = folder / DESCRIPTION_FILE
    # From the Hub only the files asked for arrive: the description is then all that tells the other kind.
    said = field(read_json(description), "kind", str, description) if description.is_file() else None
    for other, (kind, words, reader) in READERS.items():
        if other != masks_file and (said == kind or (folder / other).is_file()):
            raise ValueError(f"`{folder}` holds {words} and no `{masks_file}`. Read it with `{reader}`.")
    raise FileNotFoundError(
        f"`{folder / masks_file}` does not exist. The folder of {READERS[masks_file][1]} holds `{masks_file}`."
    )
