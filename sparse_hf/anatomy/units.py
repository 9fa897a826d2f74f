"""The heads and neurons of a Transformers model: how many there are, and which layer reads them."""

import dataclasses
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from sparse_hf.algorithms.zero_partitions import whole_shape
from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.anatomy.modeling_slim import UnitTable, base_of, table_from_dict, unit_counts
from sparse_hf.anatomy.unit_families import UNIT_TABLES


@dataclass(frozen=True)
class Units:
    """The heads, or the neurons, of one layer.

    `key` is the layer's path from the base model and the kind: `encoder.layer.0.heads`. `output` is the full name of
    the linear layer that reads them: unit i is its inputs `i * width` to `(i + 1) * width`.
    """

    key: str
    count: int
    width: int
    output: str

    @property
    def kind(self) -> str:
        """`heads` or `neurons`."""
        return self.key.rpartition(".")[2]


def find_units(model: nn.Module, table: UnitTable | None = None) -> list[Units]:
    """The heads and neurons of every layer, in model order, heads first.

    With grouped-query attention a head is a whole group: one key/value head with the query heads that share it, so
    that the number of query heads per key/value head stays what the config says.

    Args:
        table: of a family that is not supported, or that deviates.

    Raises:
        ValueError: there is no table for the model's family, or it does not fit; or ranks hold parts of its weights.
    """
    model = unwrap(model)
    table = table or table_of(model)
    _check_whole(model)
    prefix, _ = base_of(model)
    units = []
    for key, count in unit_counts(model, table).items():
        path, _, kind = key.rpartition(".")
        output = f"{prefix}{path}.{table.head_output if kind == 'heads' else table.neuron_output}"
        module = model.get_submodule(output)
        inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
        if inputs % count:
            raise ValueError(
                f"`{output}` reads {inputs} values, which {count} {kind} do not divide: correct the table."
            )
        units.append(Units(key, count, inputs // count, output))
    return units


def _check_whole(model: nn.Module) -> None:
    split = [
        name for name, one in model.named_parameters() if isinstance(one, DTensor) or one.shape != whole_shape(one)
    ]
    if split:
        raise ValueError(
            f"Heads and neurons are found in whole weights, but ranks hold parts of `{split[0]}` and {len(split) - 1} "
            "more. Cut the model in one process and load the smaller one here, or load the model before "
            "`TrainingArguments` switch ZeRO-3 on."
        )


def table_of(model: nn.Module) -> UnitTable:
    """The table of the model's family, or the one that a slim model carries.

    Raises:
        ValueError: the family has none.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    if getattr(config, "slim", None):
        return table_from_dict(config.slim.get("table"))
    model_type = getattr(config, "model_type", None)
    for table in UNIT_TABLES.get(model_type, ()):
        if _fits(model, table):
            return table
    fields = ", ".join(f"{entry.name}={entry.metadata['help']!r}" for entry in dataclasses.fields(UnitTable)[:5])
    raise ValueError(
        f"Heads and neurons are known for {', '.join(UNIT_TABLES)}, got {model_type!r} ({type(model).__name__}). "
        f"For another family pass a table, no code is needed: `UnitTable({fields})`."
    )


def _fits(model: nn.Module, table: UnitTable) -> bool:
    base = base_of(model)[1]
    names = {name for name, _ in base.named_modules()}
    wanted = [*table.head_projections, table.head_output, *table.neuron_projections, table.neuron_output]
    return all(f"{table.layers}.0.{path}" in names for path in wanted)
