"""Cut a model to a structured ticket, and read such models back."""

from pathlib import Path

from torch import nn

from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.registration import model_class_named
from sparse_hf.anatomy.slim import cut_units
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.file_names import CONFIG_FILE
from sparse_hf.storage.locations import local_folder
from sparse_hf.tickets.structured_ticket import StructuredTicket


def slim(
    model: nn.Module, ticket: StructuredTicket, uniform: bool = False, unit_table: UnitTable | None = None
) -> nn.Module:
    """A new, really smaller model with the ticket's heads and neurons; `model` stays whole.

    `save_pretrained` of the result writes a stock folder where every layer keeps the same counts and the stock config
    can say so. Otherwise the folder loads by `AutoModel....from_pretrained` after `import sparse_hf`, by `load_slim`,
    or without sparse_hf by `trust_remote_code=True` from one file beside the weights.

    Args:
        model: a `transformers.PreTrainedModel`.
        uniform: insist on the stock form.
        unit_table: of a family that is not supported.

    Raises:
        ValueError: the ticket belongs to another architecture, or the stock form cannot say it.
        TypeError: the model is no `PreTrainedModel`.
    """
    return cut_units(model, ticket.units, unit_table, uniform)


def load_slim(name_or_path: str | Path, **kwargs: object) -> nn.Module:
    """Read a slim model with the class it was saved with, of any family, by sparse_hf's own code.

    Args:
        name_or_path: a folder or a Hub id.
        kwargs: of `from_pretrained`.

    Raises:
        FileNotFoundError: no such model.
        ValueError: its config names no model class, or layers are missing in the checkpoint.
    """
    places = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    config = read_json(local_folder(name_or_path, [CONFIG_FILE], **places) / CONFIG_FILE)
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = model_class_named(name)
    if found is None:
        raise ValueError(f"`{name_or_path}` must name a model class in `architectures`, got {name!r:.100}.")
    return found.from_pretrained(name_or_path, **kwargs)
