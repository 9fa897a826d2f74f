"""Draw an early-bird structured ticket on a GLUE task, cut the model, train the smaller one; or run the controls.

    python recipes/earlybert_glue.py --mode search --task_name sst2 --model_name_or_path bert-base-uncased \
        --heads 0.333 --neurons 0.4 --output_dir out/sst2 --num_train_epochs 2 --learning_rate 4e-5 \
        --search_learning_rate 2e-5 --eval_strategy epoch
    accelerate launch recipes/earlybert_glue.py --mode random --ticket out/sst2/ticket --task_name sst2 \
        --model_name_or_path bert-base-uncased --output_dir out/sst2-random --num_train_epochs 2

Modes: `search` (search, draw, train), `ticket` (train the model cut to somebody's ticket), and the controls `dense`,
`random` (random heads and neurons, in the shape of `--ticket` where one is given), `magnitude` (units of the largest
pretrained weights). Data: a GLUE task from the Hub, or `--train_file` and `--validation_file` (.tsv, .csv, .jsonl,
each also .gz). A killed search continues with `--resume_from_checkpoint true`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from glue_model import TaskArguments, trainer_parts
from sparse_hf import EarlyBirdConfig, SparseTrainer, StructuredTicket, plot_mask_distances


@dataclass
class Arguments:
    """What is run."""

    mode: Literal["search", "ticket", "dense", "random", "magnitude"] = field(
        default="search", metadata={"help": "What to run, see above."}
    )
    ticket: str | None = field(default=None, metadata={"help": "Folder or Hub id, for modes ticket and random."})
    heads: float | None = field(default=None, metadata={"help": "Fraction of heads to cut (default 1/3)."})
    neurons: float | None = field(default=None, metadata={"help": "Fraction of FFN neurons to cut (default 0.4)."})
    target_speedup: float | None = field(default=None, metadata={"help": "Instead: how many times faster."})
    uniform: bool = field(default=False, metadata={"help": "Same counts in every layer, saved in the stock form."})
    ranking: Literal["signed", "absolute"] = field(default="signed", metadata={"help": "Of the coefficients."})
    l1: float = field(default=1e-4, metadata={"help": "Strength of the L1 penalty on coefficients."})
    coefficient_learning_rate: float | None = field(default=None, metadata={"help": "Default: the training's."})
    search_learning_rate: float | None = field(default=None, metadata={"help": "Default: the training's."})
    draw_at: str | None = field(default=None, metadata={"help": "Draw at this step, or 0.2 of an epoch."})


def config_of(arguments: Arguments) -> EarlyBirdConfig:
    """The config that the command line describes."""
    names = ("heads", "neurons", "target_speedup", "uniform", "ranking", "l1")
    rates = ("coefficient_learning_rate", "search_learning_rate")
    given = arguments.draw_at
    moment = None if given is None else float(given) if "." in given else int(given)
    return EarlyBirdConfig(**{name: getattr(arguments, name) for name in names + rates}, draw_at=moment)


def sparsity_of(arguments: Arguments, model: PreTrainedModel, seed: int) -> EarlyBirdConfig | StructuredTicket | None:
    """What the trainer is told in the chosen mode."""
    ticket = None if arguments.ticket is None else StructuredTicket.from_pretrained(arguments.ticket)
    match arguments.mode:
        case "dense":
            return None
        case "search":
            return config_of(arguments)
        case "ticket":
            if ticket is None:
                raise ValueError("Mode `ticket` needs `--ticket`, a folder or a Hub id.")
            return ticket
        case "random" if ticket is not None:
            return ticket.shuffled(seed)
    return StructuredTicket.from_model(model, config_of(arguments), arguments.mode, seed)


def main() -> None:
    """Run one mode."""
    parser = HfArgumentParser((TaskArguments, Arguments, TrainingArguments))
    task, arguments, training_args = parser.parse_args_into_dataclasses()
    parts = trainer_parts(task, training_args)
    sparsity = sparsity_of(arguments, parts["model"], training_args.seed)
    trainer = SparseTrainer(**parts, sparsity=sparsity)
    resume = training_args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume == "true" else resume)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics["parameters"] = trainer.model.num_parameters()
    if trainer.is_world_process_zero() and sparsity is not None:
        print(f"Ticket: {trainer.ticket}")
    if trainer.is_world_process_zero() and arguments.mode == "search":
        search, picture = trainer.search, Path(training_args.output_dir) / "mask_distances.png"
        plot_mask_distances(search.distances, search.steps, search.drawn_at, picture)
        print(f"Drawn at step {search.drawn_at}; the mask's way there is in {picture}")
        if "early_bird_saved_fraction" in result.metrics:
            print(f"Wall-clock time saved, the search included: {result.metrics['early_bird_saved_fraction']:.1%}")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
