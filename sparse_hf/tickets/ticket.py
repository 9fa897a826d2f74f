"""A ticket: which weights of a base model stay, and where that was learned."""

import dataclasses
import difflib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.algorithms.mask_distance import hamming_distance, overlap
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import find_sites
from sparse_hf.storage.checked_json import field as checked
from sparse_hf.storage.checked_json import read_json
from sparse_hf.storage.durable import write_folder, write_json
from sparse_hf.storage.locations import local_folder, push_folder
from sparse_hf.storage.mask_file import MASKS_FILE, load_bits, save_bits
from sparse_hf.tickets.fingerprint import base_fingerprint


DESCRIPTION_FILE = "sparse_hf.json"


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


class Ticket:
    """Masks keyed by canonical parameter name, one bit per weight, plus their origin.

    No model is needed to read, compare or save one. A ticket found with one task head applies to the same encoder
    under any other head, because names are relative to the base model.
    """

    def __init__(
        self, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], origin: TicketOrigin | None = None
    ) -> None:
        """Usually made by `from_masks`, `from_model`, `from_pretrained` or a `SparseTrainer`.

        Args:
            bits: packed masks, 1-D uint8, by canonical parameter name.
            shapes: the parameters' shapes by the same names.
        """
        self.bits = dict(bits)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.origin = origin or TicketOrigin()

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], origin: TicketOrigin | None = None) -> "Ticket":
        """A ticket of bool masks (True = kept) by canonical parameter name."""
        bits = {name: pack_bits(mask).cpu() for name, mask in masks.items()}
        return cls(bits, {name: tuple(mask.shape) for name, mask in masks.items()}, origin)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> "Ticket":
        """Read the mask off a pruned model: what is exactly zero is pruned.

        A weight that is kept but happens to be zero counts as pruned; `trainer.ticket` knows the difference.
        """
        parameters = named_canonical_parameters(model)
        sites = find_sites(model, include, exclude)
        masks = {site.parameter: parameters[site.parameter].detach() != 0 for site in sites}
        return cls.from_masks(masks, origin_of(model))

    def mask(self, name: str) -> Tensor:
        """Bool mask of one parameter, True = kept.

        Raises:
            KeyError: the ticket has no such parameter; the message lists near names.
        """
        if name not in self.bits:
            raise KeyError(f"The ticket has no mask for `{name}`.{_near(name, self.bits)}")
        return unpack_bits(self.bits[name], self.shapes[name])

    def masks(self) -> dict[str, Tensor]:
        """All bool masks by canonical parameter name; 1 byte per weight."""
        return {name: self.mask(name) for name in self.bits}

    @property
    def num_weights(self) -> int:
        """Number of prunable weights: the denominator of `sparsity`."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(self.mask(name).sum()) for name in self.bits)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are zero."""
        return 1 - self.num_kept / self.num_weights

    def model_sparsity(self) -> float | None:
        """Fraction of all parameters of the whole model that the ticket zeroes; None if its size is not recorded."""
        whole = self.origin.model_parameters
        return (self.num_weights - self.num_kept) / whole if whole else None

    def sparsity_by_site(self) -> dict[str, float]:
        """Fraction of zeros per matrix; each expert of a 3-D expert stack counts as its own matrix."""
        result = {}
        for name, mask in ((name, self.mask(name)) for name in self.bits):
            if mask.ndim == 3:
                for expert, part in enumerate(mask):
                    result[f"{name}[{expert}]"] = 1 - part.float().mean().item()
            else:
                result[name] = 1 - int(mask.sum()) / mask.numel()
        return result

    def overlap(self, other: "Ticket") -> float:
        """Kept by both / kept by either (the overlap of Chen et al. 2020), in [0, 1]."""
        self._check_comparable(other)
        return overlap([self.mask(name) for name in self.bits], [other.mask(name) for name in self.bits])

    def distance(self, other: "Ticket") -> float:
        """Fraction of positions at which the masks differ (the mask distance of Early-Bird Tickets), in [0, 1]."""
        self._check_comparable(other)
        return hamming_distance([self.mask(name) for name in self.bits], [other.mask(name) for name in self.bits])

    def apply(self, model: nn.Module, check_base: bool = True) -> nn.Module:
        """Zero the pruned weights of `model` in place, after everything was checked.

        Training brings the zeros back: train with `SparseTrainer(..., sparsity=ticket)` to keep them.

        Args:
            check_base: compare the model's kept weights with those of the base the ticket was found on.

        Raises:
            ValueError: names, shapes or base weights do not fit; the model is unchanged.
        """
        self.check(model, check_base)
        parameters = named_canonical_parameters(model)
        for name in self.bits:
            bits = sign_extended(self.mask(name)).to(parameters[name].device)
            zero_pruned_(parameters[name].data, bits)
        return model

    def check(self, model: nn.Module, check_base: bool = True) -> None:
        """Raise the error that `apply` would raise, without changing anything."""
        parameters = named_canonical_parameters(model)
        problems = []
        for name, shape in self.shapes.items():
            if name not in parameters:
                problems.append(f"no parameter `{name}`{_near(name, parameters)}")
            elif tuple(parameters[name].shape) != shape:
                problems.append(f"`{name}` has shape {list(parameters[name].shape)}, the ticket {list(shape)}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            found = f" a {self.origin.model_type}" if self.origin.model_type else " another model"
            raise ValueError(
                f"The ticket (found on{found}) does not fit {type(model).__name__}: {shown}. "
                "Apply it to the architecture it was found on."
            )
        expected = self.origin.base_fingerprint
        if check_base and expected is not None and base_fingerprint(parameters, self.bits) != expected:
            raise ValueError(
                f"The ticket was found on other base weights ({self.origin.base_model or 'name not recorded'}) than "
                f"{type(model).__name__} holds now. Load that base, or pass `check_base=False` to use the mask anyway."
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `sparse_masks.safetensors` and `sparse_hf.json` into a new folder, or replace a ticket there as a whole.

        Raises:
            FileExistsError: the folder holds something else than a ticket.
            OSError: the disk is full or not writable; an older ticket survives.
        """
        folder = Path(folder)
        if folder.exists():
            strangers = sorted({file.name for file in folder.iterdir()} - {MASKS_FILE, DESCRIPTION_FILE, "README.md"})
            if strangers:
                raise FileExistsError(
                    f"`{folder}` must be new or hold an older ticket, found {strangers[0]!r}. Choose another folder."
                )
        write_folder(folder, self._write)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Ticket":
        """Read a ticket from a folder or a Hub id.

        Args:
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: no such folder or repository, or it holds no ticket.
            ValueError: a file is truncated, damaged or hostile.
        """
        folder = local_folder(name_or_path, [MASKS_FILE, DESCRIPTION_FILE], revision, token, cache_dir)
        bits, shapes = load_bits(folder / MASKS_FILE)
        if not bits:
            raise ValueError(f"`{folder / MASKS_FILE}` holds no mask. It is not a ticket.")
        description = folder / DESCRIPTION_FILE
        return cls(bits, shapes, _read_origin(description) if description.is_file() else None)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload ticket",
    ) -> str:
        """Upload the ticket, creating the repository if needed; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "ticket"
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, private, token, commit_message)

    def description(self) -> dict:
        """What `sparse_hf.json` says: origin, and sparsity with its denominators."""
        kept, weights = self.num_kept, self.num_weights
        return {
            "kind": "ticket",
            **dataclasses.asdict(self.origin),
            "sparsity": {
                "prunable_weights": weights,
                "kept_weights": kept,
                "of_prunable_weights": 1 - kept / weights,
                "of_whole_model": self.model_sparsity(),
            },
        }

    def _write(self, folder: Path) -> None:
        save_bits(folder / MASKS_FILE, self.bits, self.shapes)
        write_json(folder / DESCRIPTION_FILE, self.description())

    def _check_comparable(self, other: "Ticket") -> None:
        differing = sorted(set(self.shapes.items()) ^ set(other.shapes.items()))
        if differing:
            raise ValueError(
                f"Only tickets of one architecture can be compared; `{differing[0][0]}` has no counterpart of its shape."
            )

    def __repr__(self) -> str:
        return f"Ticket(sparsity={self.sparsity:.4f}, weights={self.num_weights}, method={self.origin.method!r})"


def origin_of(model: nn.Module, **known: object) -> TicketOrigin:
    """The origin of a ticket drawn on `model`: its type, size, name and revision, plus what is `known`."""
    config = getattr(model, "config", None)
    facts = {
        "model_type": getattr(config, "model_type", None),
        "base_model": getattr(config, "name_or_path", None) or None,
        "base_revision": getattr(config, "_commit_hash", None),
        "model_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"torch": torch.__version__},
    }
    return TicketOrigin(**(facts | known))


def _read_origin(path: Path) -> TicketOrigin:
    content = read_json(path)
    kinds = {"config": dict, "metrics": dict, "versions": dict, "model_parameters": int}
    values = {}
    for entry in dataclasses.fields(TicketOrigin):
        kind = kinds.get(entry.name, str)
        values[entry.name] = checked(content, entry.name, kind, path, {} if kind is dict else None)
    return TicketOrigin(**values)


def _near(name: str, names: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (near names: {', '.join(close)})" if close else ""
