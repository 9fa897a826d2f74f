"""How do callbacks that count (early stopping) begin each round anew, and continue when a round is resumed?

The Trainer restores them only on request and then by building new objects, which loses references to them; here their
attributes are set in place.
"""

import copy
import json
from pathlib import Path

from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ExportableState


def callback_states(trainer: Trainer) -> dict[str, dict]:
    """The counters of each stateful callback, by class name."""
    return {type(one).__name__: one.state()["attributes"] for one in _stateful(trainer)}


def set_callback_states(trainer: Trainer, states: dict[str, dict]) -> None:
    """Set the counters that `callback_states` returned."""
    for one in _stateful(trainer):
        for name, value in states.get(type(one).__name__, {}).items():
            setattr(one, name, copy.deepcopy(value))


def stopped_early(trainer: Trainer) -> bool:
    """Whether early stopping has run out of patience, by its counters."""
    stoppers = [one for one in _stateful(trainer) if isinstance(one, EarlyStoppingCallback)]
    return any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stoppers)


def states_in_checkpoint(checkpoint: Path) -> dict[str, dict]:
    """The counters as a Trainer checkpoint holds them."""
    content = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    stored = content.get("stateful_callbacks", {}).items()
    # A class with several instances is stored as a list; they cannot be told apart and begin anew.
    return {name: state.get("attributes", {}) for name, state in stored if isinstance(state, dict)}


def _stateful(trainer: Trainer) -> list[ExportableState]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
