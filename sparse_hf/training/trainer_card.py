"""What does a trainer bring to the Hub beside the model: masks, a card about them, and not its working files."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from sparse_hf.cards.card import CARD_FILE, PICTURE_FILE, draw_layers, license_of, make_card, save_card
from sparse_hf.cards.inspect import inspect
from sparse_hf.storage.durable import write_file
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.tickets.ticket_folder import DESCRIPTION_FILE


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


# What the Trainer does not copy from a checkpoint by itself: masks, what they are, and the code of a slim model.
BESIDE_WEIGHTS = (MASKS_FILE, DESCRIPTION_FILE, "*.py")
# A search's files that only serve to resume it; see "A search on disk" in docs/architecture.md.
WORKING_FILES = ("/start.safetensors", "/rewind.safetensors", "/coefficients.safetensors")
WORKING_FILES += ("/round-*/", "/search/", "/first-stage/")
TRAINING = "## Training procedure"


def complete_card(trainer: "SparseTrainer", source: Path | None = None, target: Path | None = None) -> None:
    """Write our card in the place of the Trainer's, with what that one knows; a model without sparsity keeps it.

    Args:
        source: the folder that tells what is sparse; by default the output folder, where the Trainer's card is.
        target: the folder to write to; by default the output folder too.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.search is not None:
        leave_working_files_here(folder)
    try:
        found = inspect(source or folder, count_zeros=False)
    except FileNotFoundError:  # nothing was saved yet
        return
    if found.kind in ("model", "adapter"):
        return
    stock, target = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True), target or folder
    base = found.base_model or stock.data.base_model
    found = dataclasses.replace(found, base_model=base if isinstance(base, str) else None)
    name = trainer.hub_model_id or folder.resolve().name
    _, _, training = stock.text.partition(TRAINING)
    card = make_card(
        found,
        name,
        last_evaluation(trainer),
        stock.data.license or license_of(found, trainer.args.hub_token),
        picture=draw_layers(found, target / PICTURE_FILE),
        more=[(TRAINING.removeprefix("## "), training.strip())] if training.strip() else [],
    )
    data = card.data
    data.tags = list(dict.fromkeys([*data.tags, *(stock.data.tags or [])]))
    data.datasets, data.language = stock.data.datasets, stock.data.get("language")
    if stock.data.eval_results:  # of a data set that the Trainer knows by name
        data.model_name, data.eval_results = stock.data.model_name, stock.data.eval_results
    save_card(card, target / CARD_FILE)


def last_evaluation(trainer: "SparseTrainer") -> dict[str, float]:
    """The numbers of the last evaluation, by name."""
    for entry in reversed(trainer.state.log_history):
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if found:
            return {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return {}


def bring_from_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Copy what belongs beside the weights of a checkpoint to where they are pushed from."""
    for pattern in BESIDE_WEIGHTS:
        for file in sorted(checkpoint.glob(pattern)):
            write_file(folder / file.name, lambda partial, file=file: shutil.copyfile(file, partial) and None)


def leave_working_files_here(folder: Path) -> None:
    """Name them in a `.gitignore`, which the Hub applies to an upload: resuming needs them, nobody else."""
    path = folder / ".gitignore"
    there = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if missing := [line for line in WORKING_FILES if line not in there]:
        text = "\n".join([*there, *missing]) + "\n"
        write_file(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)
