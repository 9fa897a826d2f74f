"""Which checkpoint of an interrupted run is whole?"""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparse_hf.storage.checked_json import read_json


# The states of optimizer, scheduler and random numbers, each under the names that the Trainer, FSDP (whole or sharded)
# and DeepSpeed give it.
NEEDED = (
    ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*optim_states.pt"),
    ("scheduler.pt", "global_step*/*model_states.pt"),
    ("rng_state*.pth",),
)
ZIPPED = ("*.pt", "*.pth", "optimizer.bin", "global_step*/*.pt")


def last_complete_checkpoint(folder: Path, needed: str | None = None) -> Path | None:
    """The newest `checkpoint-N` in `folder` that was written to its end; one cut off by a kill is passed over.

    Args:
        needed: name of a JSON file that belongs to it beside the Trainer's own files.
    """
    numbered = []
    if folder.is_dir():
        for entry in folder.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
            if match and entry.is_dir():
                numbered.append((int(match.group(1)), entry))
    return next((entry for _, entry in sorted(numbered, reverse=True) if is_complete(entry, needed)), None)


def is_complete(checkpoint: Path, needed: str | None = None) -> bool:
    """Whether a Trainer checkpoint can be continued bit for bit: nothing of it is missing or cut off.

    `trainer_state.json` is its last file. A checkpoint without optimizer and random states (`save_only_model`) is not.
    """
    try:
        steps_in_checkpoint(checkpoint)
        if needed is not None:
            read_json(checkpoint / needed)
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    if not all(any(file for pattern in patterns for file in checkpoint.glob(pattern)) for patterns in NEEDED):
        return False
    return all(zipfile.is_zipfile(file) for pattern in ZIPPED for file in checkpoint.glob(pattern))


def steps_in_checkpoint(checkpoint: Path) -> int:
    """The optimizer steps after which a Trainer checkpoint was written.

    Raises:
        OSError, ValueError: `trainer_state.json` is missing or damaged.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    steps = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(steps, int):
        raise ValueError(f"`{checkpoint / 'trainer_state.json'}` must say its `global_step`, got {steps!r}.")
    return steps
