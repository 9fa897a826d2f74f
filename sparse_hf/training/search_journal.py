"""What has a search finished, as far as the disk knows?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.durable import write_json
from sparse_hf.training.snapshot import everything, save_snapshot


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


SEARCH_FILE = "search.json"


@dataclass
class SearchJournal:
    """The state of a search, rewritten durably after every finished step."""

    folder: Path
    config: dict
    rounds: list[dict] = field(default_factory=list)  # per finished round: sparsity, metrics, seconds
    finished: bool = False

    def save(self) -> None:
        """Write `search.json`."""
        content = {"config": self.config, "rounds": self.rounds, "finished": self.finished}
        write_json(self.folder / SEARCH_FILE, content)


def begin_search(
    trainer: "SparseTrainer", journal: SearchJournal, start: Path, wanted: Callable[[str], bool] = everything
) -> None:
    """Save what is `wanted` of the model as it was given to `start`, and the journal, unless an earlier run did."""
    is_new = not journal.rounds and not (journal.folder / SEARCH_FILE).is_file()
    trainer.accelerator.wait_for_everyone()  # until every rank has seen the folder as it was
    if is_new:
        save_snapshot(trainer.model, start, wanted, writes=trainer.args.should_save)
    if is_new and trainer.args.should_save:
        journal.save()
    trainer.accelerator.wait_for_everyone()


def open_journal(folder: Path, config: dict, resume: bool) -> SearchJournal:
    """The journal of the search in `folder`, or a new one.

    Args:
        config: the search's config as a dict; a search can only be resumed with the config it was started with.
        resume: continue what is there; a folder without a search begins one.

    Raises:
        FileExistsError: the folder holds a run, and `resume` is off.
        ValueError: the search there has another config.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        patterns = ("checkpoint-*", "round-*", "search/checkpoint-*", "first-stage/checkpoint-*")
        others = sorted(str(entry.relative_to(folder)) for pattern in patterns for entry in folder.glob(pattern))
        if others:
            raise FileExistsError(
                f"`{folder}` holds another run ({others[0]}), which a search would mix with its own. "
                "Choose another `output_dir`."
            )
        return SearchJournal(folder, config)
    if not resume:
        raise FileExistsError(
            f"`{folder}` already holds a search. Pass `resume_from_checkpoint=True` to continue it, or "
            "choose another `output_dir`."
        )
    content = read_json(path)
    stored = content.get("config", {})
    differing = sorted(name for name in config.keys() | stored.keys() if config.get(name) != stored.get(name))
    if differing:
        name = "method" if "method" in differing else differing[0]
        raise ValueError(
            f"The search in `{folder}` was started with {name}={stored.get(name)!r}, got {config.get(name)!r}. "
            "Resume with the same config, or choose another `output_dir`."
        )
    return SearchJournal(folder, config, content.get("rounds", []), content.get("finished", False))
