"""Tune an encoder on a GLUE task by DSEE, or by what it is compared with, over several seeds in one command.

    python recipes/dsee_glue.py --task_name rte --model_name_or_path bert-base-uncased --r 16 --nnz 64 \
        --sparsity 0.2 --masked_modules key dense --seeds 1 2 3 4 5 --learning_rate 5e-4 --num_train_epochs 10 \
        --first_epochs 5 --output_dir out/rte
    accelerate launch recipes/dsee_glue.py --method lora --r 16 ...

With `--sparsity`, DSEE trains twice: S1 is chosen by the size of the update in between (`--first_epochs`,
`--first_learning_rate` are the first stage's). `--base_sparsity` masks from the start, by |W0|, and trains once.
Methods to compare with: `lora`, `shira` (both of PEFT, with as many trained numbers for equal `--r`), and `full`.
Each seed has a folder; one that is finished is not repeated, and a killed one continues when the command is repeated.
"""

import copy
import itertools
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from transformers import HfArgumentParser, TrainingArguments

from glue_model import TaskArguments, trainer_parts
from sparse_hf import DseeConfig, DseeTwoStageConfig, SparseTrainer, dsee_sparsity, support_by_gradient


GRADIENT_BATCHES = 8  # that say where S2's entries lie with `--support gradient`


@dataclass
class Arguments:
    """What is run."""

    method: Literal["dsee", "lora", "shira", "full"] = field(default="dsee", metadata={"help": "See above."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One training each."})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Tuned matrices, by the end of their name."}
    )
    masked_modules: list[str] | None = field(default=None, metadata={"help": "Matrices that S1 masks as well."})
    r: int = field(default=16, metadata={"help": "Rank of U V, or of LoRA; SHiRA trains as many numbers."})
    alpha: float = field(default=32.0, metadata={"help": "Updates are multiplied by alpha / r."})
    nnz: int = field(default=64, metadata={"help": "Entries of S2 in each tuned matrix."})
    support: str = field(
        default="magnitude",
        metadata={"help": "Where they are, see `DseeConfig`; `gradient`: where that of a few batches is largest."},
    )
    base_sparsity: float = field(default=0.0, metadata={"help": "S1 from the start, by |W0|."})
    sparsity: float = field(default=0.0, metadata={"help": "S1 by the update, between two stages."})
    first_epochs: float | None = field(default=None, metadata={"help": "Of the first stage; default: as the second."})
    first_learning_rate: float | None = field(default=None, metadata={"help": "Default: as the second stage's."})


def adapter_of(arguments: Arguments, seed: int) -> PeftConfig | None:
    """The PEFT config of the chosen method; None tunes every weight."""
    where = {"target_modules": arguments.target_modules, "task_type": "SEQ_CLS"}
    match arguments.method:
        case "lora":
            return LoraConfig(r=arguments.r, lora_alpha=arguments.alpha, **where)
        case "shira":
            return ShiraConfig(r=arguments.r, random_seed=seed, **where)
        case "dsee":
            names = ("r", "alpha", "nnz", "support", "masked_modules", "base_sparsity")
            options = {name: getattr(arguments, name) for name in names}
            if arguments.support == "gradient":
                options["support"] = "magnitude"  # until there are batches
            return DseeConfig(**options, seed=seed, **where)
    return None


def train_seed(task: TaskArguments, arguments: Arguments, training_args: TrainingArguments) -> dict:
    """Train and evaluate with one seed; what `eval_results.json` of its folder says."""
    folder = Path(training_args.output_dir)
    check_same(folder, asdict(task) | asdict(arguments))
    if (folder / "eval_results.json").is_file():
        return json.loads((folder / "eval_results.json").read_text())
    parts = trainer_parts(task, training_args)
    adapter = adapter_of(arguments, training_args.seed)
    if adapter is not None:
        parts["model"] = get_peft_model(parts["model"], adapter)
    stages = None
    if arguments.method == "dsee" and arguments.sparsity:
        first = (arguments.first_epochs, arguments.first_learning_rate)
        stages = DseeTwoStageConfig(arguments.sparsity, "update", *first)
    trainer = SparseTrainer(**parts, sparsity=stages)
    begun = (folder / "search.json").is_file() or any(folder.glob("checkpoint-*/trainer_state.json"))
    if arguments.method == "dsee" and arguments.support == "gradient" and not begun:
        support_by_gradient(trainer.model, itertools.islice(trainer.get_train_dataloader(), GRADIENT_BATCHES))
    result = trainer.train(resume_from_checkpoint=begun or None)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics["trained_parameters"] = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    if arguments.method == "dsee":
        metrics["base_sparsity"], metrics["merged_sparsity"] = dsee_sparsity(trainer.model)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def check_same(folder: Path, given: dict) -> None:
    """Note what a seed's folder is run with; refuse to mix two experiments in it."""
    given.pop("seeds")
    note = folder / "arguments.json"
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(given, indent=2))
    held = json.loads(note.read_text())
    if differing := [name for name in given if held.get(name) != given[name]]:
        raise ValueError(
            f"`{folder}` holds a run with {differing[0]}={held.get(differing[0])!r}, got {given[differing[0]]!r}. "
            "Choose another `output_dir`."
        )


def main() -> None:
    """Run every seed, then print mean and standard deviation of each metric."""
    parser = HfArgumentParser((TaskArguments, Arguments, TrainingArguments))
    task, arguments, training_args = parser.parse_args_into_dataclasses()
    found = []
    for seed in arguments.seeds:
        one = copy.copy(training_args)
        one.seed, one.output_dir = seed, str(Path(training_args.output_dir) / f"seed-{seed}")
        found.append(train_seed(task, arguments, one))
    if training_args.process_index == 0:
        for name in found[0]:
            values = [one[name] for one in found]
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"{name}: {statistics.mean(values):.4f} ± {spread:.4f} over seeds {arguments.seeds}")
        print(f"trained_parameters: {found[0]['trained_parameters']:,}")


if __name__ == "__main__":
    main()
