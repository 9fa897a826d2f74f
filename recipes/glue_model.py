"""What the GLUE recipes share: which model and data, and the Trainer's arguments made of them."""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from glue_tasks import compute_metrics, label_names, load_task


@dataclass
class TaskArguments:
    """A pretrained encoder, and a task from the Hub or in local files (.tsv, .csv, .jsonl, each also .gz)."""

    model_name_or_path: str = field(metadata={"help": "Pretrained encoder, a folder or a Hub id."})
    task_name: str | None = field(default=None, metadata={"help": "GLUE task: columns, labels and metric."})
    dataset_name: str | None = field(default=None, metadata={"help": "Another data set on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Local training data."})
    validation_file: str | None = field(default=None, metadata={"help": "Local validation data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset, drawn by seed."})
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad all inputs to it, as run_glue.py does, instead of each batch to its longest."},
    )


def trainer_parts(task: TaskArguments, training_args: TrainingArguments, *, pretrained: bool = True) -> dict:
    """The arguments of a Trainer: model with a new head, tokenized data, collator and the task's metric.

    Args:
        pretrained: False draws all weights anew, for a control.
    """
    files = (task.train_file, task.validation_file, task.dataset_name)
    train, validation = load_task(task.task_name, *files, task.max_train_samples, training_args.seed)
    names = label_names(train)
    config = AutoConfig.from_pretrained(task.model_name_or_path, num_labels=max(1, len(names)))
    config.problem_type = None if names else "regression"
    tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)
    set_seed(training_args.seed)
    if pretrained:
        model = AutoModelForSequenceClassification.from_pretrained(task.model_name_or_path, config=config)
    else:
        model = AutoModelForSequenceClassification.from_config(config)
    # These heads take the mean over their rows, whatever number of rows they are told to divide by. A Trainer that
    # believes they listen multiplies loss and gradients by the number of processes and of accumulated batches.
    model.accepts_loss_kwargs = False

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        padding = "max_length" if task.pad_to_max_length else False
        return tokenizer(*texts, truncation=True, max_length=task.max_length, padding=padding)

    def tokenized(data: Dataset) -> Dataset:
        return data.map(tokenize, batched=True)

    return {
        "model": model,
        "args": training_args,
        "train_dataset": tokenized(train),
        "eval_dataset": tokenized(validation),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": compute_metrics(task.task_name),
    }
