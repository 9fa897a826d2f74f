"""The nine GLUE tasks: columns, labels and metrics, read from the Hub or from files on disk.

    train, validation = load_task("rte", train_file="RTE/train.tsv", validation_file="RTE/dev.tsv")

Both data sets have the columns `text`, `text_pair` (pair tasks only) and `label`, whatever the source called them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from read_columns import columns_of_file, columns_of_splits


@dataclass(frozen=True)
class Task:
    """Facts about one task. Names are those on the Hub; `labels` stand in the order of their numbers."""

    text_columns: tuple[str, ...]
    labels: tuple[str, ...]  # none: the label is a number to predict, a regression
    metrics: tuple[str, ...] = ("accuracy",)
    validation_split: str = "validation"
    release_names: dict[str, str] = field(default_factory=dict)  # column in GLUE's own files -> name on the Hub
    release_columns: tuple[str, ...] = ()  # of a tab-separated release file that has no header row


PAIR, ENTAILMENT = ("sentence1", "sentence2"), ("entailment", "not_entailment")
# fmt: off
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",),
                 release_columns=("source", "label", "author_mark", "sentence")),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                 validation_split="validation_matched",
                 release_names={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"),
                 release_names={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}),
    "qnli": Task(("question", "sentence"), ENTAILMENT),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"),
                release_names={"is_duplicate": "label"}),
    "rte": Task(PAIR, ENTAILMENT),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "stsb": Task(PAIR, (), ("pearson", "spearman"), release_names={"score": "label"},
                 release_columns=("genre", "file", "year", "id", "label", "sentence1", "sentence2")),
    "wnli": Task(PAIR, ("not_entailment", "entailment")),
}
# fmt: on
TEXT_COLUMNS = (PAIR, ("text", "text_pair"), ("sentence",), ("text",))  # without a task: the first that are there
METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


def load_task(
    task_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Training and validation data: of the two files (.tsv, .csv, .jsonl, each also .gz), else of a Hub data set.

    Without `dataset_name` that is `nyu-mll/glue`. Without `task_name` the labels are the distinct ones of the training
    data, sorted. `max_train_samples` keeps a random subset of the training rows, the same for the same `seed`.
    """
    task = find_task(task_name)
    if (train_file is None) != (validation_file is None) or (train_file and dataset_name):
        raise ValueError("Give `train_file` and `validation_file` together, or `dataset_name`, not a mixture.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"`max_train_samples` must be at least 1, got {max_train_samples}.")
    if train_file:
        layout = (task.release_names, task.release_columns) if task else ()
        tables = [columns_of_file(path, *layout) for path in (train_file, validation_file)]
    elif dataset_name or task_name:
        on_hub = (dataset_name,) if dataset_name else ("nyu-mll/glue", task_name)
        tables = columns_of_splits(*on_hub, splits=("train", task.validation_split if task else "validation"))
    else:
        raise ValueError(f"Nothing to load: give two files, `dataset_name` or a task: {', '.join(TASKS)}.")
    task = task or task_of(tables[0])
    sources = [train_file, validation_file] if train_file else ["the training split", "the validation split"]
    train, validation = (to_dataset(table, task, source) for table, source in zip(tables, sources, strict=True))
    if max_train_samples is not None and max_train_samples < len(train):
        train = train.shuffle(seed=seed).select(range(max_train_samples))
    return train, validation


def label_names(data: Dataset) -> list[str]:
    """Names of the classes in the order of their numbers; empty for a regression."""
    label = data.features["label"]
    return label.names if isinstance(label, ClassLabel) else []


def compute_metrics(task_name: str | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics as a Trainer's `compute_metrics`; accuracy without a task."""
    task = find_task(task_name) or Task((), ("any",))

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.argmax(-1) if task.labels else logits.reshape(-1)
        return {name: float(METRICS[name](prediction.label_ids, predicted)) for name in task.metrics}

    return compute


def find_task(task_name: str | None) -> Task | None:
    if task_name is not None and task_name not in TASKS:
        raise ValueError(f"Unknown GLUE task `{task_name}`. Choose one of: {', '.join(TASKS)}.")
    return None if task_name is None else TASKS[task_name]


def task_of(table: dict[str, list]) -> Task:
    texts = next((texts for texts in TEXT_COLUMNS if set(texts) <= set(table)), TEXT_COLUMNS[-1])
    labels = {str(label) for label in table.get("label", ())}
    return Task(texts, tuple(sorted(labels, key=lambda label: (int(label) if label.isdigit() else -1, label))))


def to_dataset(table: dict[str, list], task: Task, source: str) -> Dataset:
    needed = (*task.text_columns, "label")
    if not set(needed) <= set(table):
        raise ValueError(
            f"`{source}` must have the columns {', '.join(needed)}; it has: {', '.join(table) or 'none'}."
        )
    if not table["label"]:
        raise ValueError(f"`{source}` has no rows.")
    columns = {name: table[column] for name, column in zip(("text", "text_pair"), task.text_columns, strict=False)}
    features = dict.fromkeys(columns, Value("string"))
    if task.labels:
        columns["label"] = class_numbers(table["label"], task.labels, source)
        features["label"] = ClassLabel(names=list(task.labels))
    else:
        columns["label"] = [float(label) for label in table["label"]]
        features["label"] = Value("float32")
    return Dataset.from_dict(columns, features=Features(features))


def class_numbers(labels: list, names: tuple[str, ...], source: str) -> list[int]:
    numbers = {name: number for number, name in enumerate(names)}
    if not any(name.isdigit() for name in names):  # then a file may also hold the numbers themselves
        numbers |= {str(number): number for number in range(len(names))}
    if unknown := sorted({str(label) for label in labels} - set(numbers)):
        raise ValueError(f"`{source}`: `label` must be one of {', '.join(numbers)}; got `{unknown[0]}`.")
    return [numbers[str(label)] for label in labels]
