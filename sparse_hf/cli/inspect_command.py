"""`sparse-hf inspect`: what is sparse in a folder or a repository?"""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sparse_hf.cli.messages import console


if TYPE_CHECKING:
    from sparse_hf.cards.inspection import Inspection


KINDS = {
    "model": "dense model",
    "sparse_model": "sparse model",
    "slim_model": "slim model (heads and neurons cut out)",
    "mixture": "mixture of experts",
    "compressed_model": "compressed sparse model",
    "ticket": "ticket",
    "structured_ticket": "structured ticket",
    "dsee_adapter": "DSEE adapter",
    "adapter": "adapter",
}
MOST_ROWS = 2000  # of a table; `--json` has all


def inspect_folder(
    name: Annotated[str, typer.Argument(help="Folder or Hub id of a model, a ticket or an adapter.")],
    count_zeros: Annotated[
        bool | None,
        typer.Option(help="Read weights that no masks tell about. Default: those of a folder, none from the Hub."),
    ] = None,
    matrices: Annotated[bool, typer.Option("--matrices", help="A row per matrix instead of per layer.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for programs.")] = False,
) -> None:
    """Tell what is sparse in a folder or a repository; no model is loaded."""
    from sparse_hf.cards.inspect import inspect

    found = inspect(name, count_zeros=count_zeros, revision=revision)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        return
    for fact, value in facts(found).items():
        console.print(f"{fact}: {value}", markup=False, highlight=False, soft_wrap=True)
    table = _units(found) if found.units else _zeros(found, matrices)
    if table is not None:
        console.print(table)


def facts(found: "Inspection") -> dict[str, str]:
    """What there is to say in a line each."""
    from sparse_hf.cards.markdown import one_line

    base = found.base_model and f"{found.base_model} {found.base_revision or ''}"
    lines = {"kind": KINDS[found.kind], "method": found.method, "base model": base, "architecture": found.model_type}
    if found.sparsity is not None:
        told = {"masks": "by its masks", "weights": "counted in the weights", "heads": "by compressed heads"}[
            found.counted
        ]
        lines["zeros"] = f"{found.sparsity:.2%} ({found.zeros:,} of {found.weights:,}), {told}"
    elif not found.units and found.kind in ("model", "mixture"):
        lines["zeros"] = "not counted; --count-zeros reads the weights"
    if found.model_sparsity is not None:
        lines["zeros in the whole model"] = f"{found.model_sparsity:.2%}"
    if found.mixture is not None:
        layers = "" if found.mixture.layers is None else f" in {found.mixture.layers} layers"
        lines["experts"] = f"{found.mixture.experts}{layers}, {found.mixture.top_k or '?'} per token"
        lines["begins as the dense model's function"] = {True: "yes", False: "no", None: None}[found.mixture.exact]
    if found.adapter is not None:
        lines["adapter"] = f"{found.adapter.tuned} matrices tuned, {found.adapter.trained:,} numbers trained"
        lines["rank, entries"] = f"{found.adapter.rank}, {found.adapter.nnz} per matrix"
    if {"bytes", "dense_bytes"} <= found.compression.keys():
        lines["compressed"] = f"{found.compression['bytes']:,} of {found.compression['dense_bytes']:,} bytes"
    lines["metrics"] = ", ".join(f"{name} {value:.4g}" for name, value in list(found.metrics.items())[:20])
    lines["parameters"] = f"{found.parameters:,}" if found.parameters else None
    lines["size"] = f"{found.bytes:,} bytes in {len(found.files)} files"
    return {name: one_line(value, 400) for name, value in lines.items() if value}


def _units(found: "Inspection") -> Table:
    from sparse_hf.cards.markdown import one_line

    layers: dict[str, dict[str, str]] = {}
    for one in found.units[:MOST_ROWS]:
        kept = f"{one.kept:,}" if one.units is None else f"{one.kept:,} of {one.units:,}"
        layers.setdefault(one.layer, {})[one.kind] = kept
    table = Table("layer", "heads kept", "neurons kept")
    for layer, kept in layers.items():
        table.add_row(escape(one_line(layer)), kept.get("heads", ""), kept.get("neurons", ""))
    return table


def _zeros(found: "Inspection", by_matrix: bool) -> Table | None:
    from sparse_hf.cards.layers import by_layer
    from sparse_hf.cards.markdown import one_line

    if not found.matrices:
        return None
    if by_matrix:
        table = Table("matrix", "weights", "zeros")
        for one in found.matrices[:MOST_ROWS]:
            table.add_row(escape(one_line(one.name)), f"{one.weights:,}", f"{one.sparsity:.2%}")
        return table
    table = Table("layer", "matrices", "weights", "zeros", "least", "most")
    for layer in by_layer(found.matrices)[:MOST_ROWS]:
        shares = [one.sparsity for one in layer.matrices]
        sizes = (str(len(layer.matrices)), f"{layer.weights:,}", f"{layer.zeros / layer.weights:.2%}")
        table.add_row(escape(one_line(layer.name)), *sizes, f"{min(shares):.2%}", f"{max(shares):.2%}")
    return table
