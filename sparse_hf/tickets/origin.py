"""Where does a ticket come from?"""

import dataclasses
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from torch import nn

from sparse_hf import __version__
from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.storage.checked_json import field as checked
from sparse_hf.storage.checked_json import read_json


@dataclass(frozen=True)
class TicketOrigin:
    """Where a ticket comes from; everything in it is plain JSON."""

    method: str | None = field(default=None, metadata={"help": "Method that found the mask."})
    config: dict = field(default_factory=dict, metadata={"help": "That method's config."})
    base_model: str | None = field(default=None, metadata={"help": "Name or path the base weights were loaded from."})
    base_revision: str | None = field(default=None, metadata={"help": "Commit of the base model on the Hub."})
    base_fingerprint: str | None = field(default=None, metadata={"help": "Hash of the base's kept weights."})
    model_type: str | None = field(default=None, metadata={"help": "Architecture, as in `config.model_type`."})
    model_parameters: int | None = field(default=None, metadata={"help": "Number of parameters of the whole model."})
    metrics: dict = field(default_factory=dict, metadata={"help": "Metrics at the end of the search."})
    versions: dict = field(default_factory=dict, metadata={"help": "Versions of the libraries used."})


def origin_of(model: nn.Module, **known: object) -> TicketOrigin:
    """The origin of a ticket drawn on `model`: its type, size, name and revision, plus what is `known`."""
    config = getattr(unwrap(model), "config", None)
    facts = {
        "model_type": getattr(config, "model_type", None),
        "base_model": getattr(config, "name_or_path", None) or None,
        "base_revision": getattr(config, "_commit_hash", None),
        "model_parameters": sum(math.prod(whole_shape(parameter)) for parameter in model.parameters()),
        "versions": {"sparse_hf": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    return TicketOrigin(**(facts | known))


def read_origin(path: Path) -> TicketOrigin:
    """The origin in a `sparse_hf.json`, each field of its type; what else the file says is ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or hostile.
    """
    content = read_json(path)
    kinds = {"config": dict, "metrics": dict, "versions": dict, "model_parameters": int}
    values = {}
    for entry in dataclasses.fields(TicketOrigin):
        kind = kinds.get(entry.name, str)
        values[entry.name] = checked(content, entry.name, kind, path, {} if kind is dict else None)
    if values["model_parameters"] is not None and values["model_parameters"] < 1:
        raise ValueError(f"`model_parameters` in `{path}` must be 1 or more, got {values['model_parameters']}.")
    return TicketOrigin(**values)
