"""How is a model of each kind made again, as far as that is recorded? Code for a card."""

import re

from sparse_hf.cards.inspection import Inspection
from sparse_hf.cards.loading import base_id
from sparse_hf.cards.markdown import literal


# The method that a description names -> the config whose fields it recorded.
CONFIGS = {
    "lottery_ticket": "LotteryTicketConfig",
    "gradual_pruning": "GradualPruningConfig",
    "static_sparsity": "StaticSparsityConfig",
    "early_bird": "EarlyBirdConfig",
}
MOST_FIELDS = 40  # of a config


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
