"""How is a model of each kind loaded, and made? Code for a card."""

import re
from pathlib import Path

from sparse_hf.cards.inspection import Inspection
from sparse_hf.cards.markdown import hub_id, literal


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
# The method that a description names -> the config whose fields it recorded.
CONFIGS = {
    "lottery_ticket": "LotteryTicketConfig",
    "gradual_pruning": "GradualPruningConfig",
    "static_sparsity": "StaticSparsityConfig",
    "early_bird": "EarlyBirdConfig",
}
MOST_FIELDS = 40  # of a config


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


def making_code(inspection: Inspection) -> tuple[str, str] | None:
    """Language and text of what makes such a model again, as far as that is recorded; None if it is not."""
    fields = {name: value for name, value in list(inspection.config.items())[:MOST_FIELDS] if _is_field(name)}
    base = base_id(inspection) or "MODEL"
    if inspection.method == "one_shot":
        options = {"sparsity": "--sparsity", "score": "--score", "budget": "--budget", "seed": "--seed"}
        words = [f"{option} {_word(fields[name])}" for name, option in options.items() if name in fields]
        return "sh", " ".join(["sparse-hf prune", base, "FOLDER", *words])
    if inspection.mixture is not None and inspection.mixture.made_by == "upcycled_model":
        return "sh", _upcycling(inspection, base)
    if inspection.method not in CONFIGS:
        return None
    config = CONFIGS[inspection.method]
    given = [
        f"    {name}={literal(value)}," for name, value in fields.items() if name != "method" and value is not None
    ]
    lines = [f"from sparse_hf import {config}, SparseTrainer", "", f"config = {config}(", *given, ")"]
    return "python", "\n".join([*lines, "SparseTrainer(model, arguments, train_dataset=..., sparsity=config).train()"])


def _upcycling(inspection: Inspection, base: str) -> str:
    mixture = inspection.mixture
    granularity = mixture.init.get("granularity", 1)
    granularity = granularity if type(granularity) is int and granularity > 0 else 1
    words = ["sparse-hf upcycle", base, "FOLDER", f"--experts {mixture.experts // granularity}"]
    words += [f"--top-k {mixture.top_k}"] if mixture.top_k else []
    words += [f"--granularity {granularity}"] if granularity > 1 else []
    words += ["--shared-half"] if mixture.init.get("shared_half") is True else []
    for name, option in (("drop", "--drop"), ("noise_std", "--noise-std")):
        value = mixture.init.get(name)
        words += [f"{option} {value}"] if isinstance(value, float) and value > 0 else []
    return " ".join(words)


def _is_field(name: str) -> bool:
    return name.isidentifier() and name.isascii() and len(name) <= 60


def _word(value: object) -> str:
    """A value of a command line option."""
    text = str(value)[:100]
    return text if re.fullmatch(r"[\w.+-]{1,60}", text, re.ASCII) else "..."
