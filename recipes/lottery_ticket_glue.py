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

from transformers import HfArgumentParser, TrainingArguments

from glue_model import TaskArguments, trainer_parts
from sparse_hf import LotteryTicketConfig, SparseTrainer, StaticSparsityConfig


@dataclass
class Arguments:
    """What is run."""

    mode: Literal["search", "ticket", "dense", "one_shot", "random", "reinit"] = field(
        default="search", metadata={"help": "What to run, see above."}
    )
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
    parser = HfArgumentParser((TaskArguments, Arguments, TrainingArguments))
    task, arguments, training_args = parser.parse_args_into_dataclasses()
    sparsity = sparsity_of(arguments, training_args.seed)
    parts = trainer_parts(task, training_args, pretrained=arguments.mode != "reinit")
    trainer = SparseTrainer(**parts, sparsity=sparsity)
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
