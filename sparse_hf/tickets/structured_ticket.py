"""A structured ticket: which heads and neurons of a base model stay, and where that was learned."""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.bits import pack_bits, unpack_bits
from sparse_hf.algorithms.settling import unit_mask_distance
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.mask_file import load_bits, save_bits
from sparse_hf.tickets.config_checks import check_choice
from sparse_hf.tickets.draw_units import draw_units, magnitude_scores
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.origin import TicketOrigin, origin_of, read_origin
from sparse_hf.tickets.ticket_folder import (
    DESCRIPTION_FILE,
    UNITS_FILE,
    find_masks_file,
    push_ticket,
    write_ticket_folder,
)


KINDS = ("heads", "neurons")


class StructuredTicket:
    """One bool mask of attention heads and one of FFN neurons per layer (True = kept), plus their origin.

    A mask is keyed "<layer's path in the base model>.heads" or "....neurons", so a ticket found with one task head
    fits the same encoder under any other. No model is needed to read, compare or save one.
    """

    def __init__(self, units: Mapping[str, Tensor], origin: TicketOrigin | None = None) -> None:
        """Usually made by a `SparseTrainer` or `from_pretrained`.

        Args:
            units: 1-D bool masks by unit key, in model order. With grouped-query attention the entries of a mask of
                heads are whole key/value groups.

        Raises:
            ValueError: no masks, a key that names no heads or neurons, a mask that is not 1-D bool or keeps nothing.
        """
        if problem := _problem(units):
            raise ValueError(
                f"A structured ticket needs a 1-D bool mask that keeps at least one unit for each key: {problem}. "
                "Pass masks such as {'encoder.layer.0.heads': tensor([True, False])}."
            )
        self.units = {key: mask.detach().cpu().clone() for key, mask in units.items()}
        self.origin = origin or TicketOrigin()

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: EarlyBirdConfig | None = None,
        score: Literal["magnitude", "random"] = "magnitude",
        seed: int = 0,
    ) -> "StructuredTicket":
        """A ticket drawn without any training, under the budgets of `config`: a control for what a search finds.

        Args:
            score: "magnitude", the norm of all weights of a unit (see `magnitude_scores`), or "random".

        Raises:
            ValueError: unknown score, a `target_speedup` (which takes a search), an unsupported family, or a budget
                that empties a layer.
        """
        config = config or EarlyBirdConfig()
        check_choice("score", score, Literal["magnitude", "random"])
        if config.target_speedup is not None:
            raise ValueError("`from_model` draws `heads` and `neurons`, got a `target_speedup`: that takes a search.")
        scores = magnitude_scores(model, config.unit_table)
        if score == "random":
            generator = torch.Generator().manual_seed(seed)
            scores = {key: torch.rand(one.shape, generator=generator) for key, one in scores.items()}
        return cls(draw_units(scores, config), origin_of(model, method=f"{score}_units"))

    def shuffled(self, seed: int) -> "StructuredTicket":
        """As many heads and neurons in every layer, chosen at random: the control at equal shape."""
        generator = torch.Generator().manual_seed(seed)
        units = {key: mask[torch.randperm(len(mask), generator=generator)] for key, mask in self.units.items()}
        return StructuredTicket(units, dataclasses.replace(self.origin, method="random_units", config={}, metrics={}))

    def counts(self) -> dict[str, int]:
        """Number of kept units by key, in model order."""
        return {key: int(mask.sum()) for key, mask in self.units.items()}

    def kept_fraction(self, kind: str) -> float:
        """Kept heads / all heads of the model (or neurons), in (0, 1].

        Args:
            kind: "heads" or "neurons".

        Raises:
            ValueError: the ticket has no such units.
        """
        totals = self._totals()
        if kind not in totals:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, totals))} in this ticket, got {kind!r}.")
        kept, units = totals[kind]
        return kept / units

    def distance(self, other: "StructuredTicket") -> float:
        """Fraction of positions at which the masks differ, in [0, 1]: of heads or of neurons, whichever is larger.

        Neurons outnumber heads by hundreds to one, so a fraction of both together would hide the heads.

        Raises:
            ValueError: the tickets are of different units.
        """
        sizes, other_sizes = self._sizes(), other._sizes()
        if differing := sorted(set(sizes.items()) ^ set(other_sizes.items())):
            key = differing[0][0]
            raise ValueError(
                f"Only structured tickets of the same units can be compared, `{key}` has {sizes.get(key, 0)} here and "
                f"{other_sizes.get(key, 0)} there. Find both on the same architecture."
            )
        return unit_mask_distance(self.units, {key: other.units[key] for key in self.units})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `sparse_units.safetensors` and `sparse_hf.json` into a new folder, or replace a ticket as a whole.

        Raises:
            FileExistsError: the folder holds something else than a structured ticket, or is a file.
            OSError: the disk is full or not writable; an older ticket survives.
            ValueError: a key is no parameter's path.
        """
        folder = Path(folder)
        write_ticket_folder(folder, UNITS_FILE, self._write)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "StructuredTicket":
        """Read a structured ticket from a folder or a Hub id.

        Args:
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: no such folder or repository, or it holds no ticket.
            ValueError: a file is truncated, damaged or hostile, or the ticket is a `Ticket` of single weights.
        """
        folder = local_folder(name_or_path, [UNITS_FILE, DESCRIPTION_FILE], revision, token, cache_dir)
        path = find_masks_file(folder, UNITS_FILE)
        bits, shapes = load_bits(path)  # in the order of the header's shapes, which is the order they were saved in
        units = {key: unpack_bits(bits[key], shape) for key, shape in shapes.items()}
        if problem := _problem(units):
            raise ValueError(f"`{path}` is not a usable structured ticket: {problem}. It is damaged or hostile.")
        description = folder / DESCRIPTION_FILE
        return cls(units, read_origin(description) if description.is_file() else None)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload structured ticket",
    ) -> str:
        """Upload the ticket with a card, creating the repository if needed; returns the address of the commit."""
        return push_ticket(self.save_pretrained, repo_id, private, token, commit_message)

    def description(self) -> dict:
        """What `sparse_hf.json` says: origin, and how many units of how many stay, in all and per layer."""
        layers: dict[str, dict] = {}
        for key, kept in self.counts().items():
            layer, _, kind = key.rpartition(".")
            layers.setdefault(layer, {"layer": layer}).update({kind: len(self.units[key]), f"kept_{kind}": kept})
        totals = {}
        for kind, (kept, units) in self._totals().items():
            totals |= {kind: units, f"kept_{kind}": kept}
        origin = dataclasses.asdict(self.origin)
        return {"kind": "structured_ticket", **origin, "units": totals, "layers": list(layers.values())}

    def _write(self, folder: Path) -> None:
        bits = {key: pack_bits(mask) for key, mask in self.units.items()}
        save_bits(folder / UNITS_FILE, bits, {key: tuple(mask.shape) for key, mask in self.units.items()})
        write_json(folder / DESCRIPTION_FILE, self.description())

    def _sizes(self) -> dict[str, int]:
        return {key: len(mask) for key, mask in self.units.items()}

    def _totals(self) -> dict[str, tuple[int, int]]:
        """Kind -> kept units, all units; a kind without masks is left out."""
        joined = {kind: [mask for key, mask in self.units.items() if key.endswith(f".{kind}")] for kind in KINDS}
        return {kind: (int(torch.cat(masks).sum()), sum(map(len, masks))) for kind, masks in joined.items() if masks}

    def __repr__(self) -> str:
        kept = [f"{kind} {kept}/{units} kept" for kind, (kept, units) in self._totals().items()]
        layers = len({key.rpartition(".")[0] for key in self.units})
        size = f"{layers} layers" if layers > 1 else "1 layer"
        return f"StructuredTicket({', '.join([*kept, size, self.origin.method or 'method not recorded'])})"


def _problem(units: Mapping[str, Tensor]) -> str | None:
    """What no structured ticket may hold; None if there is nothing of it."""
    if not units:
        return "it has no masks"
    for key, mask in units.items():
        layer, _, kind = key.rpartition(".")
        if not layer or kind not in KINDS:
            return f"{reprlib.repr(key)} must be a layer's path and then `.heads` or `.neurons`"
        if mask.ndim != 1 or mask.dtype != torch.bool:
            return f"the mask of `{key}` is {mask.ndim}-D {mask.dtype}"
        if not mask.any():
            return f"the mask of `{key}` keeps none of {len(mask)}"
    return None
