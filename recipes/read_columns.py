"""Columns of a file or of a Hub data set, as plain lists: `load_dataset` alone cannot read GLUE's own files."""

import csv
import gzip
import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain

from datasets import ClassLabel, load_dataset


def columns_of_file(
    path: str, our_names: Mapping[str, str] | None = None, without_header: Sequence[str] = ()
) -> dict[str, list]:
    """Columns of a .tsv, .csv or .jsonl file, each also .gz. A row with too few columns is left out with a warning.

    A first line with a tab means tab-separated, whatever the name says (STS-B's `.csv` is), and quotes are text then.

    Args:
        our_names: what to call a column in place of its name in the header.
        without_header: the columns of a file whose first row is as long as this and names no `label`: it is data then.
    """
    path = str(path)
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        if path.removesuffix(".gz").endswith(".jsonl"):
            records = [json.loads(line) for line in file if line.strip()]
            return {name: [record.get(name) for record in records] for name in (records[0] if records else ())}
        first = file.readline()
        lines = chain([first], file)
        fields = (line.rstrip("\r\n").split("\t") for line in lines) if "\t" in first else csv.reader(lines)
        rows = [row for row in fields if any(row)]
    header = [(our_names or {}).get(name, name) for name in (rows[0] if rows else ())]
    if without_header and len(header) >= len(without_header) and "label" not in header:
        header = list(without_header)
    else:
        rows = rows[1:]
    whole = [row for row in rows if len(row) >= len(header)]
    if len(whole) < len(rows):
        warnings.warn(f"`{path}`: left out {len(rows) - len(whole)} rows with too few columns.", stacklevel=2)
    return {name: [row[column] for row in whole] for column, name in enumerate(header)}


def columns_of_splits(dataset_name: str, *config: str, splits: tuple[str, ...]) -> list[dict[str, list]]:
    """Columns of each split. Class labels come as their names: data sets number the same classes differently."""
    data = load_dataset(dataset_name, *config)
    if missing := [split for split in splits if split not in data]:
        raise ValueError(f"`{dataset_name}` has no split `{missing[0]}`; it has: {', '.join(data)}.")
    tables = [data[split].to_dict() for split in splits]
    for split, table in zip(splits, tables, strict=True):
        label = data[split].features.get("label")
        if isinstance(label, ClassLabel):
            table["label"] = label.int2str(table["label"])
    return tables
