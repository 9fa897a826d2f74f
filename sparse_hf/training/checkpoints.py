"""Which checkpoint of an interrupted run is whole?"""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-N` in `folder` that was written to its end; one cut off by a kill is passed over."""
    numbered = []
    if folder.is_dir():
        for entry in folder.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
            if match and entry.is_dir():
                numbered.append((int(match.group(1)), entry))
    return next((entry for _, entry in sorted(numbered, reverse=True) if is_complete(entry)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a Trainer checkpoint has its last file, `trainer_state.json`, and no file of it is cut off."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for pattern in ("*.pt", "*.pth") for file in checkpoint.glob(pattern))
