"""How is a model of each kind loaded? Code for a card."""

from pathlib import Path

from sparse_hf.cards.inspection import Inspection
from sparse_hf.cards.markdown import hub_id


# How a class's name ends -> the Auto class that loads it, and its task on the Hub.
TASKS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),  # T5's, but also of models that see
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


def base_id(inspection: Inspection) -> str | None:
    """The base model's id on the Hub; None for a folder, even where its path looks like an id."""
    base = hub_id(inspection.base_model)
    return None if base is None or (inspection.base_revision is None and Path(base).exists()) else base


def task_of(inspection: Inspection) -> tuple[str, str | None]:
    """The Auto class, and the Hub's name of the task where it is certain."""
    named = inspection.architecture or ""
    return next((found for ending, found in TASKS.items() if named.endswith(ending)), ("AutoModel", None))


def loading_code(inspection: Inspection, repo_id: str | None) -> str:
    """A few lines of Python that load what was inspected."""
    here = f'"{repo_id or "..."}"'
    base = f'"{base_id(inspection) or "..."}"'
    auto, _ = task_of(inspection)
    own = inspection.kind == "compressed_model" or not inspection.stock
    model = [*(["import sparse_hf"] if own else []), f"from transformers import {auto}", ""]
    model += [f"model = {auto}.from_pretrained({here})"]
    ticket = ["from sparse_hf import Ticket", f"from transformers import {auto}", ""]
    ticket += [f"model = {auto}.from_pretrained({base})", f"Ticket.from_pretrained({here}).apply(model)"]
    units = ["from sparse_hf import StructuredTicket, slim", f"from transformers import {auto}", ""]
    units += [f"model = {auto}.from_pretrained({base})"]
    units += [f"smaller = slim(model, StructuredTicket.from_pretrained({here}))"]
    adapter = ["from peft import PeftModel", f"from transformers import {auto}", ""]
    adapter += [f"base = {auto}.from_pretrained({base})", f"model = PeftModel.from_pretrained(base, {here})"]
    dsee = ["import sparse_hf  # lets PEFT know DSEE adapters", *adapter]
    lines = {"ticket": ticket, "structured_ticket": units, "dsee_adapter": dsee, "adapter": adapter}
    return "\n".join(lines.get(inspection.kind, model))
