"""A model card about what is in a folder: metadata for the Hub, text, and a picture for people."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sparse_hf.cards.card_text import NOTES, OWN_CODE, SUMMARIES, facts, sections, tells_zeros
from sparse_hf.cards.inspect import inspect
from sparse_hf.cards.inspection import Inspection
from sparse_hf.cards.loading import base_id, loading_code, task_of
from sparse_hf.cards.markdown import hub_id, one_line, plain
from sparse_hf.cards.sparsity_picture import draw_sparsity
from sparse_hf.storage.durable import write_file


CARD_FILE = "README.md"
PICTURE_FILE = "sparsity.png"
TEMPLATE = Path(__file__).parent / "card_template.md"
MARK = "Written by sparse_hf, and written anew by the next push. Delete this line to keep your own text."
# What stands in cards that a program wrote, and asks to be deleted by whoever edits them: ours and the Trainer's.
GENERATED = (MARK, "This model card has been generated automatically according to the information")
BLANK = "[More Information Needed]"  # in the draft of PEFT and Transformers
# The Trainer's measurements that tell of its speed and not of the model.
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step", "total_flos", "sparsity", "round")
MOST_METRICS = 50
TAGS = {
    "sparse_model": ("sparsity", "pruning"),
    "slim_model": ("pruning", "structured-pruning"),
    "mixture": ("moe", "mixture-of-experts"),
    "compressed_model": ("sparsity", "pruning", "compressed"),
    "ticket": ("sparsity", "pruning", "lottery-ticket"),
    "structured_ticket": ("pruning", "structured-pruning", "lottery-ticket"),
    "dsee_adapter": ("sparsity", "peft", "dsee"),
    "adapter": ("peft",),
}


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    token: str | bool | None = None,
) -> Path | None:
    """Write `README.md`, and `sparsity.png` if matplotlib is there, into the folder of a model, ticket or adapter.

    Everything is read off descriptions, masks and headers by `inspect`; what others wrote there is shown as text. A
    card that a program wrote (this one, the Trainer's, PEFT's) is replaced, one that a person wrote is left alone.

    Args:
        repo_id: where it will be, for the title and for how to load it.
        metrics: what was measured, beside what the description has recorded.
        license: of the model. By default that of the base model, asked of the Hub if it can be reached.
        token: to ask with.

    Returns:
        The card's file; None if a person's card was left alone.

    Raises:
        FileNotFoundError, ValueError: see `inspect`.
        OSError: the disk is full or not writable; an older card survives.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return None
    found = inspect(folder, count_zeros=False)
    found = inspect(folder, count_zeros=True) if found.kind == "model" else found
    picture = draw_layers(found, folder / PICTURE_FILE)
    card = make_card(
        found,
        repo_id or folder.resolve().name,
        metrics or {},
        license or license_of(found, token),
        picture=picture,
    )
    save_card(card, path)
    return path


def is_generated(text: str) -> bool:
    """Whether a program wrote a card, so that nothing is lost with it."""
    if any(mark in text for mark in GENERATED):
        return True
    blanks = str(ModelCard.from_template(ModelCardData())).count(BLANK)
    return text.count(BLANK) >= blanks > 0  # nobody has filled in any


def save_card(card: ModelCard, path: Path) -> None:
    """Write a card durably."""
    write_file(path, lambda partial: partial.write_text(str(card), encoding="utf-8", newline="") and None)


def make_card(
    inspection: Inspection,
    name: str,
    metrics: Mapping[str, float],
    license: str | None = None,
    picture: str | None = None,
    more: Sequence[tuple[str, str]] = (),
) -> ModelCard:
    """The card about an inspection.

    Args:
        name: of the repository or model.
        metrics: measured, beside the inspection's own.
        picture: file name of the picture beside the card.
        more: headings and Markdown of further sections, which must be safe already.
    """
    repo_id = hub_id(name)
    title = one_line(name.rpartition("/")[2], 96)
    measured = known_metrics({**inspection.metrics, **metrics})
    note = NOTES.get(inspection.kind, "") if inspection.stock else OWN_CODE
    return ModelCard.from_template(
        metadata(inspection, title, measured, license),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        mark=MARK,
        title=plain(title),
        summary=SUMMARIES[inspection.kind],
        facts=facts(inspection),
        loading=loading_code(inspection, repo_id if repo_id and "/" in repo_id else None),
        loading_note=note,
        sections=[*sections(inspection, measured, picture), *more],
    )


def metadata(
    inspection: Inspection, title: str, metrics: Mapping[str, float], license: str | None = None
) -> ModelCardData:
    """What the Hub itself reads of a card."""
    _, task = task_of(inspection)
    method = re.sub("[^a-z0-9]+", "-", one_line(inspection.method or "", 40).lower()).strip("-")
    tags = ["sparse_hf", *TAGS.get(inspection.kind, ()), *([method] if method else [])]
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type="unknown",
            dataset_name="not recorded",
            metric_type=re.sub("[^a-z0-9_]+", "_", name.lower()).strip("_") or "metric",
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        base_model=base_id(inspection),
        library_name="sparse_hf",
        license=license,
        pipeline_tag=task,
        tags=list(dict.fromkeys(tags)),
        model_name=title if results else None,
        eval_results=results or None,
    )


def known_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """At most 50 metrics by a bounded name, without what only tells how fast they were computed."""
    named = {one_line(name, 60).removeprefix("eval_"): value for name, value in metrics.items()}
    kept = {name: value for name, value in named.items() if name and name not in NO_METRICS}
    return dict(list(kept.items())[:MOST_METRICS])


def draw_layers(inspection: Inspection, path: Path) -> str | None:
    """Draw what is gone by layer; the picture's name, None without matplotlib or if nothing is gone."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    gone = {f"{one.layer}.{one.kind}": 1 - one.kept / one.units for one in inspection.units if one.units}
    if gone:
        draw_sparsity(gone, path, "Heads and neurons that were cut", "fraction that is gone")
    elif tells_zeros(inspection):
        zeros = {one.name: one.sparsity for one in inspection.matrices}
        draw_sparsity(zeros, path, f"{inspection.zeros:,} of {inspection.weights:,} weights are zero")
    else:
        return None
    return path.name


def license_of(inspection: Inspection, token: str | bool | None = None) -> str | None:
    """The licence that the Hub has for the base model; None if that cannot be known now."""
    base = base_id(inspection)
    if base is None:
        return None
    try:
        info = HfApi(token=token).model_info(base, timeout=10)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None
    found = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return found[0] if found and re.fullmatch("[a-z0-9.+-]{1,64}", found[0]) else None
