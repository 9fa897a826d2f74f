"""A ticket: which weights of a base model stay, and where that was learned."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.algorithms.mask_distance import hamming_distance, overlap
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import whole_of
from sparse_hf.anatomy.canonical_names import named_canonical_parameters
from sparse_hf.anatomy.sites import find_sites
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.mask_file import MASKS_FILE, load_bits, save_bits
from sparse_hf.tickets.fingerprint import base_fingerprint
from sparse_hf.tickets.fit import misfits, near
from sparse_hf.tickets.origin import TicketOrigin, origin_of, read_origin
from sparse_hf.tickets.site_pieces import pieces_of
from sparse_hf.tickets.ticket_folder import DESCRIPTION_FILE, find_masks_file, push_ticket, write_ticket_folder


class Ticket:
    """Masks keyed by canonical parameter name, one bit per weight, plus their origin.

    No model is needed to read, compare or save one. A ticket found with one task head applies to the same encoder
    under any other head, because names are relative to the base model; the mask of a pooler is skipped under a head
    that leaves the pooler out.
    """

    def __init__(
        self, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], origin: TicketOrigin | None = None
    ) -> None:
        """Usually made by `from_masks`, `from_model`, `from_pretrained` or a `SparseTrainer`.

        Args:
            bits: packed masks, 1-D uint8, by canonical parameter name.
            shapes: the parameters' shapes by the same names.

        Raises:
            ValueError: no masks, or masks without shapes.
        """
        if set(bits) != set(shapes) or not sum(math.prod(shape) for shape in shapes.values()):
            raise ValueError(f"A ticket needs a mask and a shape of each matrix, got {len(bits)} and {len(shapes)}.")
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
        held = pieces_of(find_sites(model, include, exclude), parameters)
        masks = held.join([part != 0 for part in held.take(parameters)], parameters)
        whole = {name: whole_of(mask, parameters[name]) for name, mask in masks.items()}
        return cls.from_masks(whole, origin_of(model))

    def mask(self, name: str) -> Tensor:
        """Bool mask of one parameter, True = kept.

        Raises:
            KeyError: the ticket has no such parameter; the message lists near names.
        """
        if name not in self.bits:
            raise KeyError(f"The ticket has no mask for `{name}`.{near(name, self.bits)}")
        return unpack_bits(self.bits[name], self.shapes[name])

    def masks(self) -> dict[str, Tensor]:
        """All bool masks by canonical parameter name; 1 byte per weight."""
        return {name: self.mask(name) for name in self.bits}

    @property
    def num_weights(self) -> int:
        """Number of prunable weights, the denominator of `sparsity`: all weights of the masked parameters."""
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
                    result[f"{name}[{expert}]"] = 1 - int(part.sum()) / part.numel()
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
        for name in self.bits.keys() & parameters.keys():
            bits = sign_extended(self.mask(name)).to(parameters[name].device)
            zero_pruned_(parameters[name].data, bits)
        return model

    def masks_for(self, model: nn.Module, check_base: bool = True) -> dict[str, Tensor]:
        """The bool masks that `apply` would use, by canonical parameter name, or the error it would raise."""
        self.check(model, check_base)
        parameters = named_canonical_parameters(model)
        return {name: self.mask(name) for name in self.bits if name in parameters}

    def check(self, model: nn.Module, check_base: bool = True) -> None:
        """Raise the error that `apply` would raise, without changing anything."""
        parameters = named_canonical_parameters(model)
        if problems := misfits(self.shapes, parameters):
            found = f" a {self.origin.model_type}" if self.origin.model_type else " another model"
            raise ValueError(
                f"The ticket (found on{found}) does not fit {type(model).__name__}: {problems}. "
                "Apply it to the architecture it was found on."
            )
        expected = self.origin.base_fingerprint
        if check_base and expected is not None and base_fingerprint(parameters, self.bits) != expected:
            raise ValueError(
                f"The ticket was found on other base weights ({self.origin.base_model or 'name not recorded'}) than "
                f"{type(model).__name__} holds now. Load that base, or pass `check_base=False` to use the mask anyway."
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `sparse_masks.safetensors` and `sparse_hf.json` into a new folder, or replace a ticket as a whole.

        Raises:
            FileExistsError: the folder holds something else than a ticket, or is a file.
            OSError: the disk is full or not writable; an older ticket survives.
        """
        folder = Path(folder)
        write_ticket_folder(folder, MASKS_FILE, self._write)
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
            ValueError: a file is truncated, damaged or hostile, or the ticket is a `StructuredTicket`.
        """
        folder = local_folder(name_or_path, [MASKS_FILE, DESCRIPTION_FILE], revision, token, cache_dir)
        bits, shapes = load_bits(find_masks_file(folder, MASKS_FILE))
        if not bits:
            raise ValueError(f"`{folder / MASKS_FILE}` holds no mask, so it is not a ticket. Name another folder.")
        description = folder / DESCRIPTION_FILE
        return cls(bits, shapes, read_origin(description) if description.is_file() else None)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload ticket",
    ) -> str:
        """Upload the ticket with a card, creating the repository if needed; returns the address of the commit."""
        return push_ticket(self.save_pretrained, repo_id, private, token, commit_message)

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
                f"Only tickets of the same matrices can be compared, `{differing[0][0]}` has no equal in shape. "
                "Find both with the same `include` and `exclude`."
            )

    def __repr__(self) -> str:
        return f"Ticket(sparsity={self.sparsity:.4f}, weights={self.num_weights}, method={self.origin.method!r})"
