"""What does a card say in words? Sections of Markdown about an inspection."""

from collections.abc import Mapping

from sparse_hf.cards.inspection import NOTICEABLE, Inspection
from sparse_hf.cards.layers import by_layer
from sparse_hf.cards.loading import base_id
from sparse_hf.cards.making import making_code
from sparse_hf.cards.markdown import code, literal, plain, table


SUMMARIES = {
    "model": "A dense model.",
    "sparse_model": "A sparse model: a stock checkpoint in which pruned weights are exactly zero.",
    "slim_model": "A model that is really smaller: whole attention heads and FFN neurons were cut out of it.",
    "mixture": "A mixture of experts.",
    "compressed_model": "A sparse model, compressed: only `import sparse_hf` lets Transformers read it.",
    "ticket": "A ticket: which weights of its base model stay, one bit per weight. It holds no weights.",
    "structured_ticket": "A structured ticket: which heads and neurons of its base model stay. It holds no weights.",
    "dsee_adapter": "A DSEE adapter: a low-rank and a sparse update of frozen weights, of which some are removed.",
    "adapter": "An adapter of PEFT.",
}
NOTES = {
    "sparse_model": "No code beside Transformers is needed. Training goes on with the zeros by "
    "`SparseTrainer(..., sparsity=Ticket.from_pretrained(...))`; plain training would fill them.",
    "ticket": "`SparseTrainer(..., sparsity=ticket)` trains with these zeros.",
    "dsee_adapter": "Without `import sparse_hf` PEFT does not know this kind of adapter and stops with an error.",
    "compressed_model": "Without `import sparse_hf` it does not load.",
}
OWN_CODE = (
    "Without sparse_hf, `trust_remote_code=True` loads it by the one file of code beside the weights; read that first."
)
LOAD_PICTURE = "expert_load.png"  # of `ExpertLoadCallback`
MADE_BY = {
    "upcycled_model": "made of a dense checkpoint, whose FFNs became experts",
    "thinned_mixture": "made of a mixture with more experts",
    "merged_mixture": "made by merging an adapter of its experts",
}


def facts(inspection: Inspection) -> str:
    """The head of a card: what it is, of what it was made, how much of it is zero or gone."""
    rows = [("method", code(inspection.method))] if inspection.method else []
    rows += [("base model", _base(inspection))] if inspection.base_model else []
    rows += [("architecture", code(inspection.model_type))] if inspection.model_type else []
    if tells_zeros(inspection):
        words = {
            "masks": "zeros among the prunable weights",
            "weights": "zeros among all matrices",
            "heads": "zeros among the compressed matrices",
        }
        of = "zeros among the frozen matrices' weights" if inspection.adapter else words[inspection.counted]
        rows.append((of, f"{inspection.sparsity:.2%} ({inspection.zeros:,} of {inspection.weights:,})"))
    if tells_zeros(inspection) and inspection.model_sparsity is not None:
        rows.append(("zeros in the whole model", f"{inspection.model_sparsity:.2%}"))
    for kind in ("heads", "neurons"):
        kept, units = inspection.units_kept(kind)
        if kept:
            rows.append((f"{kind} kept", f"{kept:,}" if units is None else f"{kept:,} of {units:,}"))
    rows += _mixture(inspection) + _adapter(inspection)
    if {"bytes", "dense_bytes"} <= inspection.compression.keys():
        packed, dense = (inspection.compression[name] for name in ("bytes", "dense_bytes"))
        rows.append(("compressed size", f"{packed:,} of {dense:,} bytes"))
    rows += [("parameters of the model", f"{inspection.parameters:,}")] if inspection.parameters else []
    return table(("", ""), rows)


def tells_zeros(inspection: Inspection) -> bool:
    """Whether zeros are worth telling of: those of masks are, and more than a few among weights."""
    return inspection.counted in ("masks", "heads") or (inspection.sparsity or 0) >= NOTICEABLE


def _base(inspection: Inspection) -> str:
    base = base_id(inspection)
    if base is None:  # a folder of whoever made it: its path is nobody's business
        return code(inspection.base_model.replace("\\", "/").rstrip("/").rpartition("/")[2])
    revision = f" at {code(inspection.base_revision[:12])}" if inspection.base_revision else ""
    return f"[{plain(base)}](https://huggingface.co/{base}){revision}"


def _mixture(inspection: Inspection) -> list[tuple[str, str]]:
    mixture = inspection.mixture
    if mixture is None:
        return []
    rows = [("experts per layer", f"{mixture.experts:,}")]
    rows += [("experts per token", f"{mixture.top_k:,}")] if mixture.top_k else []
    rows += [("layers with experts", f"{mixture.layers:,}")] if mixture.layers else []
    rows += [("origin", MADE_BY[mixture.made_by])] if mixture.made_by else []
    rows += [("source architecture", code(mixture.source_type))] if mixture.source_type else []
    if mixture.exact is not None:
        rows.append(("begins as the dense model's function", "yes" if mixture.exact else "no"))
    return rows


def _adapter(inspection: Inspection) -> list[tuple[str, str]]:
    adapter = inspection.adapter
    if adapter is None:
        return []
    rows = [("matrices tuned", f"{adapter.tuned:,}"), ("numbers trained", f"{adapter.trained:,}")]
    rows += [("rank", f"{adapter.rank:,}")] if adapter.rank is not None else []
    rows += [("sparse entries per matrix", f"{adapter.nnz:,}")] if adapter.nnz is not None else []
    return rows


def sections(inspection: Inspection, metrics: Mapping[str, float], picture: str | None) -> list[tuple[str, str]]:
    """Heading and text of what follows: what was done, per layer, measured."""
    found = []
    if made := _making(inspection):
        found.append(("What was done", made))
    if layers := _layers(inspection):
        shown = f"![By layer and kind of matrix]({picture})\n\n" if picture else ""
        found.append(("By layer", shown + layers))
    if LOAD_PICTURE in inspection.files:
        found.append(("Load of the experts", f"![How evenly tokens are spread over experts]({LOAD_PICTURE})"))
    if measured := _measured(inspection, metrics):
        found.append(("What was measured", measured))
    return found


def _making(inspection: Inspection) -> str:
    made = making_code(inspection)
    if made is not None:
        language, text = made
        return f"```{language}\n{text}\n```"
    fields = [(plain(name), code(literal(value))) for name, value in list(inspection.config.items())[:40]]
    return table(("setting", "value"), fields) if fields else ""


def _layers(inspection: Inspection) -> str:
    if inspection.units:
        layers: dict[str, dict[str, str]] = {}
        for one in inspection.units:
            kept = f"{one.kept:,}" if one.units is None else f"{one.kept:,} of {one.units:,}"
            layers.setdefault(one.layer, {})[one.kind] = kept
        rows = [(code(name), kept.get("heads", "–"), kept.get("neurons", "–")) for name, kept in layers.items()]
        return table(("layer", "heads kept", "neurons kept"), rows)
    if not tells_zeros(inspection):
        return ""
    rows = []
    for layer in by_layer(inspection.matrices):
        shares = [one.sparsity for one in layer.matrices]
        spread = f"{min(shares):.1%} – {max(shares):.1%}"
        rows.append((code(layer.name), f"{layer.weights:,}", f"{layer.zeros / layer.weights:.2%}", spread))
    return table(("layer", "weights", "zeros", "least and most sparse matrix"), rows)


def _measured(inspection: Inspection, metrics: Mapping[str, float]) -> str:
    rows = [(plain(name), f"{value:.4g}") for name, value in metrics.items()]
    difference = inspection.mixture.logits_difference if inspection.mixture else None
    if difference is not None:
        rows.append(("largest difference from the dense logits, of the largest logit, untrained", f"{difference:.2g}"))
    return table(("metric", "value"), rows) if rows else ""
