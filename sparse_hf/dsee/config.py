"""What a DSEE adapter is told: `get_peft_model(model, DseeConfig(r=8, nnz=64, base_sparsity=0.3))`."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from sparse_hf.dsee.registration import dsee_type


CARD = """

### To load this adapter

It is a DSEE adapter of sparse_hf: install sparse_hf with PEFT, and `import sparse_hf` before
`PeftModel.from_pretrained(...)` or `AutoModel....from_pretrained(...)`.
"""
SUPPORTS = ("magnitude", "decomposition", "random", "rows", "columns")
ON_OTHER_BASE = ("warn", "raise")


@dataclass
class DseeConfig(PeftConfig):
    """Dually sparse fine-tuning (Chen et al., "DSEE", ACL 2023): W = W0 ⊙ S1 + (alpha / r) (U V + S2).

    W0 is frozen, S1 a fixed mask of it, U V of rank `r` and the `nnz` values of S2 are trained; S2's places are fixed.
    With `r=0` the factor alpha / r is 1.

    Beside the paper's: S1 may also be N:M, may be there from the start, and covers `masked_modules` in a group of
    their own; S2 is chosen by `support`. The released code ranks {query, value} after a first stage by the size of
    the update; see `DseeMaskingCallback`.

    Raises:
        ValueError: a value out of its range, or nothing would be trained.
    """

    r: int = field(default=8, metadata={"help": "Rank of U V; 0 for none."})
    alpha: float = field(default=16.0, metadata={"help": "The update is multiplied by alpha / r (by 1 for r=0)."})
    nnz: int = field(default=64, metadata={"help": "Trained entries of S2 in each target matrix; 0 for none."})
    support: str = field(
        default="magnitude",
        metadata={
            "help": "Where S2's entries are: the largest weights (`magnitude`), the sparse part of W = UV + S "
            "(`decomposition`), `random`, or whole `rows` or `columns` of the largest norm."
        },
    )
    base_sparsity: float = field(
        default=0.0, metadata={"help": "Share of the frozen weights that S1 removes from the start, in [0, 1)."}
    )
    base_pattern: str | None = field(
        default=None, metadata={"help": 'Instead: N of every M weights along the input stay, such as "2:4".'}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that are tuned: names, a regular expression, or `all-linear`."}
    )
    masked_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that S1 masks as well, without tuning them: names or a regex."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, such as a classifier."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of U V's input, in [0, 1)."})
    init_weights: bool = field(
        default=True, metadata={"help": "Begin as the frozen model; False begins at random (for tests)."}
    )
    seed: int = field(default=0, metadata={"help": "Of V's start and of random supports; equal on every rank."})
    on_other_base: str = field(
        default="warn", metadata={"help": "`warn` or `raise` when the base is not the one that was trained on."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Of the base's weights; written when the adapter is saved, not to be set."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = dsee_type()
        self._check()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._own_fingerprint: str | None = None

    @property
    def scaling(self) -> float:
        """What U V + S2 is multiplied by."""
        return self.alpha / self.r if self.r else 1.0

    def to_dict(self) -> dict:
        """What is saved."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        return super().to_dict() | content | {"base_fingerprint": self.base_fingerprint or self._own_fingerprint}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; and say in the model card, which PEFT wrote before, what loading the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and "import sparse_hf" not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text.rstrip() + CARD, encoding="utf-8")

    def found_on(self, fingerprint: str | None) -> None:
        """Note the base the adapter was made on, to be saved with it."""
        self._own_fingerprint = fingerprint

    def _check(self) -> None:
        for name in ("r", "nnz"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {getattr(self, name)!r}.")
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"`alpha` must be a finite number, got {self.alpha!r}.")
        if self.r == 0 and self.nnz == 0:
            raise ValueError("`r` and `nnz` are both 0, so nothing would be trained: raise one of them.")
        for name in ("base_sparsity", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)!r}.")
        for name, choices in (("support", SUPPORTS), ("on_other_base", ON_OTHER_BASE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.base_pattern is not None:
            if not (match := re.fullmatch(r"(\d+):(\d+)", self.base_pattern)) or not 0 < int(match[1]) < int(match[2]):
                raise ValueError(f'`base_pattern` must be "N:M" with 0 < N < M, got {self.base_pattern!r}.')
            if self.base_sparsity:
                raise ValueError(
                    f"`base_pattern={self.base_pattern}` already says how many weights stay, "
                    f"got `base_sparsity={self.base_sparsity}` too: pass one of them."
                )
