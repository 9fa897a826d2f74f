"""The architecture as a test: imports go to the same room or to a lower floor, and each framework has its rooms."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_hf


PACKAGE = Path(sparse_hf.__file__).parent
FLOORS = {"algorithms": 1, "anatomy": 2, "storage": 2, "cards": 3, "tickets": 4, "dsee": 4, "moe": 4}
FLOORS |= {"training": 5, "hub": 6, "cli": 7}
TRAINING_AND_UP = {"training", "hub", "cli"}

# How a used name begins -> the rooms that may use it; the longest beginning decides. What is not here is not allowed.
FRAMEWORKS = {
    "torch": set(FLOORS),
    "torch.manual_seed": set(),
    "numpy": set(FLOORS),
    "safetensors": set(FLOORS) - {"algorithms"},
    "huggingface_hub": set(FLOORS) - {"algorithms"},
    "transformers": set(FLOORS) - {"algorithms", "storage", "cards"},
    "transformers.Train": TRAINING_AND_UP,  # Trainer, TrainerCallback, TrainingArguments ...
    "transformers.train": TRAINING_AND_UP,  # ... and the modules that define them
    "accelerate": TRAINING_AND_UP,
    "deepspeed": {"training"},  # where the user trains by it; not installed otherwise
    "llvmlite": {"algorithms"},  # where it is installed
    "zstandard": {"storage"},  # where the user asks for it; not installed otherwise
    "peft": {"dsee", "hub"},
    "tqdm": {"training", "moe"},
    "matplotlib": {"cards", "hub"},
    "typer": {"cli"},
    "rich": {"cli"},
}


def used_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, at any depth, and of every attribute read from an imported module."""
    modules = {}
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                modules[bound] = alias.name if alias.asname else bound
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, node.module] if node.module else parents)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, attributes = ast.unparse(node).partition(".")
            if root in modules:
                yield node.lineno, f"{modules[root]}.{attributes}"


def broken_rule(room: str, name: str) -> str | None:
    """Why code of `room` may not use `name`; None where it may."""
    top, _, rest = name.partition(".")
    if top == "sparse_hf":
        other = rest.partition(".")[0]
        if other in (room, "__version__") or FLOORS.get(other, 99) < FLOORS[room]:
            return None
        where = f"floor {FLOORS[other]}" if other in FLOORS else "above every room"
        return f"{room} (floor {FLOORS[room]}) imports {name} ({where})"
    begins = [known for known in FRAMEWORKS if known.partition(".")[0] == top and name.startswith(known)]
    rooms = FRAMEWORKS[max(begins, key=len)] if begins else set()
    if room in rooms or top in sys.stdlib_module_names:
        return None
    return f"{room} uses {name}, which is for: {', '.join(sorted(rooms)) or 'no room'}"


def broken_rules(source: str, package: str) -> list[str]:
    room = package.split(".")[1]
    found = {(line, broken_rule(room, name)) for line, name in used_names(source, package)}
    return [f"line {line}: {rule}" for line, rule in sorted((line, rule) for line, rule in found if rule)]


def test_every_module_lives_in_a_known_room():
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    assert {path.parts[0] for path in modules} - {"__init__.py"} <= set(FLOORS)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_floors(path):
    package = ".".join(("sparse_hf", *path.relative_to(PACKAGE).parent.parts))
    assert broken_rules(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("package", "source", "rule"),
    [
        ("sparse_hf.algorithms", "import transformers", "algorithms uses transformers, which is for: anatomy, cli,"),
        ("sparse_hf.algorithms", "def f():\n    from sparse_hf.anatomy import sites", "line 2: algorithms (floor 1)"),
        ("sparse_hf.storage", "from ..anatomy import sites", "imports sparse_hf.anatomy.sites (floor 2)"),
        ("sparse_hf.tickets.draw", "from ...moe import x", "tickets (floor 4) imports sparse_hf.moe.x (floor 4)"),
        ("sparse_hf.hub", "from sparse_hf import SparseTrainer", "sparse_hf.SparseTrainer (above every room)"),
        ("sparse_hf.tickets", "import transformers as tf\ntf.Trainer", "line 2: tickets uses transformers.Trainer"),
        ("sparse_hf.anatomy", "from transformers.trainer_utils import set_seed", "for: cli, hub, training"),
        ("sparse_hf.training", "import peft.tuners", "training uses peft.tuners, which is for: dsee, hub"),
        ("sparse_hf.cli", "import torch\ntorch.manual_seed(0)", "cli uses torch.manual_seed, which is for: no room"),
        ("sparse_hf.hub", "import torchvision", "hub uses torchvision, which is for: no room"),
    ],
)
def test_the_checker_finds_a_broken_rule(package, source, rule):
    (found,) = broken_rules(source, package)
    assert rule in found


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("sparse_hf.algorithms", "import math\nimport numpy as np\nfrom torch import nn\nfrom .scores import wanda"),
        ("sparse_hf.tickets", "from sparse_hf.anatomy import sites\nfrom sparse_hf import algorithms, __version__"),
        ("sparse_hf.tickets", "import torch\ntorch.Generator().manual_seed(0)"),
        ("sparse_hf.training", "from transformers import TrainerCallback\nimport accelerate"),
        ("sparse_hf.cli", "import typer\nfrom rich.table import Table\nfrom sparse_hf.hub import describe"),
    ],
)
def test_the_checker_lets_the_allowed_pass(package, source):
    assert broken_rules(source, package) == []
