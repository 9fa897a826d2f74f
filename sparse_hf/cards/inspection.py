"""What was found in a folder or a repository, as data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from sparse_hf.cards.layers import MatrixZeros


NOTICEABLE = 0.01  # share of zeros from which on a model without masks is called sparse

Kind = Literal[
    "model",
    "sparse_model",
    "slim_model",
    "mixture",
    "compressed_model",
    "ticket",
    "structured_ticket",
    "dsee_adapter",
    "adapter",
]


@dataclass(frozen=True)
class UnitsKept:
    """How many heads or neurons of one layer stay; of how many, where that is recorded."""

    layer: str
    kind: str
    kept: int
    units: int | None


@dataclass(frozen=True)
class MixtureFacts:
    """What a config, and the description of a conversion, say about experts."""

    experts: int
    top_k: int | None
    layers: int | None = field(metadata={"help": "Layers with experts; None where no header was read."})
    made_by: str | None = field(default=None, metadata={"help": "`kind` of the description."})
    source_type: str | None = None
    init: dict = field(default_factory=dict)
    exact: bool | None = None
    logits_difference: float | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's config and header say."""

    peft_type: str
    rank: int | None
    nnz: int | None
    alpha: float | None
    tuned: int = field(metadata={"help": "Matrices with an update."})
    trained: int = field(metadata={"help": "Numbers that were trained."})


@dataclass(frozen=True)
class Inspection:
    """What is sparse in a folder or repository, and where it comes from; see `inspect`.

    Attributes:
        name: the folder or repository, as it was asked for.
        matrices: zeros by matrix; empty where nothing says them.
        counted: what says the zeros: "masks", "weights" that were read, or the "heads" of compressed tensors.
        compression: of a compressed checkpoint; empty otherwise.
        files: bytes by name.
        parameters: of the whole model, as recorded, or else the numbers in the stored weights.
    """

    name: str
    kind: Kind
    method: str | None = None
    config: dict = field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    stock: bool = True
    parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    matrices: tuple[MatrixZeros, ...] = ()
    counted: Literal["masks", "weights", "heads"] | None = None
    units: tuple[UnitsKept, ...] = ()
    mixture: MixtureFacts | None = None
    adapter: AdapterFacts | None = None
    compression: dict = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Entries of all `matrices`."""
        return sum(one.weights for one in self.matrices)

    @property
    def zeros(self) -> int:
        """Zeros among them."""
        return sum(one.zeros for one in self.matrices)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros in `matrices`: of the prunable weights if masks say them; None without matrices."""
        return self.zeros / self.weights if self.weights else None

    @property
    def model_sparsity(self) -> float | None:
        """Fraction of zeros in the whole model; None if its size is not known."""
        of_weights = bool(self.matrices) and self.adapter is None
        return self.zeros / self.parameters if of_weights and self.parameters else None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def units_kept(self, kind: str) -> tuple[int, int | None]:
        """Kept heads (or neurons), and of how many if every layer says that."""
        found = [one for one in self.units if one.kind == kind]
        totals = [one.units for one in found]
        return sum(one.kept for one in found), None if None in totals else sum(totals)

    def to_dict(self) -> dict:
        """Everything as plain JSON, totals included."""
        return {
            **dataclasses.asdict(self),
            "bytes": self.bytes,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
        }
