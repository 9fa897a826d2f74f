"""Find a lottery ticket on a GLUE task, reuse one found elsewhere, or run the controls.

    python recipes/lottery_ticket_glue.py --mode search --task_name rte --model_name_or_path bert-base-uncased \
        --sparsity 0.6 --rounds 6 --output_dir out/rte --num_train_epochs 3 --eval_strategy epoch
    accelerate launch recipes/lottery_ticket_glue.py --mode ticket --ticket out/rte/ticket --task_name mrpc \
        --model_name_or_path bert-base-uncased --output_dir out/rte-to-mrpc --num_train_epochs 3

Modes: `search` (iterative magnitude pruning with rewinding), `ticket` (train under a ticket: transfer), and the
controls `dense`, `one_shot` (magnitude of the pretrained weights), `random`, `reinit` (a ticket's mask on fresh
weights). Data: a GLUE task from the Hub, or `--train_file` and `--validation_file` (.tsv, .csv, .jsonl, each also
.gz). A killed search continues with `--resume_from_checkpoint true`.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from glue_tasks import compute_metrics, label_names, load_task
from sparse_hf import LotteryTicketConfig, SparseTrainer, StaticSparsityConfig


@dataclass
class Arguments:
    """What the training arguments do not say."""

    model_name_or_path: str = field(metadata={"help": "Pretrained encoder, a folder or a Hub id."})
    mode: Literal["search", "ticket", "dense", "one_shot", "random", "reinit"] = field(
        default="search", metadata={"help": "What to run, see above."}
    )
    task_name: str | None = field(default=None, metadata={"help": "GLUE task: columns, labels and metric."})
    dataset_name: str | None = field(default=None, metadata={"help": "Another data set on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Local training data."})
    validation_file: str | None = field(default=None, metadata={"help": "Local validation data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset, drawn by seed."})
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens."})
    ticket: str | None = field(default=None, metadata={"help": "Folder or Hub id, for modes ticket and reinit."})
    sparsity: float = field(default=0.6, metadata={"help": "Fraction of prunable weights that are zero."})
    rounds: int = field(default=6, metadata={"help": "Rounds of the search."})
    schedule: Literal["linear", "geometric"] = field(default="linear", metadata={"help": "Of the search."})
    budget: Literal["global", "uniform", "erdos_renyi", "erdos_renyi_kernel"] = field(
        default="global", metadata={"help": "One threshold for all matrices, or a density for each."}
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of matrices to leave dense."})
    rewind_step: int = field(default=0, metadata={"help": "Rewind to this step of the dense round."})
    rewind_head: bool = field(default=False, metadata={"help": "Reset the classifier in each round too."})
    round_steps: int | None = field(default=None, metadata={"help": "Steps per round; default: as the training."})


def sparsity_of(arguments: Arguments, seed: int) -> LotteryTicketConfig | StaticSparsityConfig | None:
    """The sparsity config of the chosen mode."""
    if arguments.mode in ("ticket", "reinit") and arguments.ticket is None:
        raise ValueError(f"Mode `{arguments.mode}` needs `--ticket`, a folder or a Hub id.")
    match arguments.mode:
        case "dense":
            return None
        case "search":
            names = (
                "sparsity",
                "rounds",
                "schedule",
                "budget",
                "exclude",
                "rewind_step",
                "rewind_head",
                "round_steps",
            )
            return LotteryTicketConfig(**{name: getattr(arguments, name) for name in names})
        case "ticket":
            return StaticSparsityConfig(ticket=arguments.ticket)
        case "reinit":
            return StaticSparsityConfig(ticket=arguments.ticket, check_base=False)
    score = "magnitude" if arguments.mode == "one_shot" else "random"
    where = {"budget": arguments.budget, "exclude": arguments.exclude}
    return StaticSparsityConfig(sparsity=arguments.sparsity, score=score, seed=seed, **where)


def main() -> None:
    """Run one mode."""
    arguments, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    sparsity = sparsity_of(arguments, training_args.seed)
    files = (arguments.train_file, arguments.validation_file, arguments.dataset_name)
    subset = (arguments.max_train_samples, training_args.seed)
    train, validation = load_task(arguments.task_name, *files, *subset)
    names = label_names(train)

    path = arguments.model_name_or_path
    config = AutoConfig.from_pretrained(path, num_labels=max(1, len(names)))
    config.problem_type = None if names else "regression"
    tokenizer = AutoTokenizer.from_pretrained(path)
    set_seed(training_args.seed)
    if arguments.mode == "reinit":
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, config=config)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        return tokenizer(*texts, truncation=True, max_length=arguments.max_length)

    trainer = SparseTrainer(
        model=model,
        args=training_args,
        train_dataset=train.map(tokenize, batched=True),
        eval_dataset=validation.map(tokenize, batched=True),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics(arguments.task_name),
        sparsity=sparsity,
    )
    resume = training_args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume == "true" else resume)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    if sparsity is not None:
        metrics["sparsity"] = trainer.ticket.sparsity
        metrics["model_sparsity"] = trainer.ticket.model_sparsity()
        if trainer.is_world_process_zero():
            print(f"Ticket: {trainer.ticket}")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
