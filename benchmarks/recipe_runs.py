"""What the tables of results share: runs of a recipe, done once by any of several processes, and their cells."""

import contextlib
import fcntl
import gc
import io
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def run_once(output_dir: str, name: str, run: Callable[[Path], dict], keep_bytes: int) -> bool:
    """Do a run unless its result is there or another process holds it; whether it was done now.

    Args:
        name: of the run and its folder in `output_dir`.
        run: does it in a given folder and returns the record to keep, with its `value`.
        keep_bytes: safetensors files larger than this are deleted: weights are not needed again, tickets are.
    """
    folder = Path(output_dir) / name
    if (folder / "done.json").is_file():
        return False
    locks = Path(output_dir) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if (folder / "done.json").is_file():
            return True  # by another process, between the two looks; what it allows may be next
        print(f"{name} ...", flush=True)
        start, start_cpu = time.time(), time.process_time()
        record = run(folder)
        record |= {"seconds": time.time() - start, "cpu_seconds": time.process_time() - start_cpu}
        for large in folder.rglob("*.safetensors"):
            if large.stat().st_size > keep_bytes:
                large.unlink()
        (folder / "done.json").write_text(json.dumps(record, indent=2))
        print(f"{name}: {record['value']:.4f} in {record['seconds']:.0f} s", flush=True)
        gc.collect()
        return True


def run_recipe(recipe: Path, arguments: list[str]) -> None:
    """Run a recipe in this process (loading torch anew costs seconds), without its table on the screen."""
    before, sys.argv = sys.argv, [str(recipe), *arguments]
    sys.path.insert(0, str(recipe.parent))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(recipe), run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(str(recipe.parent))


def finished(output_dir: str, names: Iterable[str]) -> list[dict]:
    """Records of those runs that are done, in order."""
    files = [Path(output_dir) / name / "done.json" for name in names]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def print_commands(output_dir: str, recipe: Path) -> None:
    """The command of every finished run of seed 0."""
    for file in sorted(Path(output_dir).glob("*-0/done.json")):
        print(f"\n{file.parent.name}: `python recipes/{recipe.name} {json.loads(file.read_text())['command']}`")


def cell(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation and every seed, in percent unless scaled otherwise."""
    if not values:
        return "not run"
    seeds = " / ".join(f"{scale * value:.{digits}f}" for value in values)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread} ({seeds})"
