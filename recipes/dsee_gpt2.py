"""Tune a causal model on E2E NLG by DSEE with the protocol of LoRA's GPT-2 harness, generate, and score.

    python recipes/dsee_gpt2.py --model_name_or_path gpt2-medium --train_file trainset.csv \
        --validation_file devset.csv --test_file testset_w_refs.csv --output_dir out/e2e
    accelerate launch recipes/dsee_gpt2.py --method lora --r 4 ...

What that harness does and what is set here unless given: 5 epochs of batch 8, AdamW at 2e-4 with weight decay 0.01 and
eps 1e-6, 500 steps of warm-up, linear decay, label smoothing 0.1, no clipping, seed 110; beam search of 10 beams. S1
comes with `--base_sparsity` from the start, or with `--sparsity` between two stages. Scores need the extra `e2e`.
Differences: the harness tunes the query and value parts of `c_attn`, here the whole fused matrix is tuned; a batch is
padded to its longest row; label smoothing is the Trainer's.
"""

import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from e2e_nlg import LONGEST_TEXT, REPEATED, collate, encode, end_of, generate, group_references, load_e2e
from sparse_hf import DseeConfig, DseeTwoStageConfig, SparseTrainer, dsee_sparsity


PROTOCOL = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
    "adam_epsilon": 1e-6,
    "warmup_steps": 500,
    "label_smoothing_factor": 0.1,
    "max_grad_norm": 0,
    "seed": 110,
    "save_strategy": "epoch",
}


@dataclass
class Arguments:
    """What is run."""

    model_name_or_path: str = field(metadata={"help": "A causal model, a folder or a Hub id."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})
    method: Literal["dsee", "lora", "full"] = field(default="dsee", metadata={"help": "How it is tuned."})
    dataset_name: str | None = field(default=None, metadata={"help": "E2E on the Hub, instead of files."})
    train_file: str | None = field(default=None, metadata={"help": "The challenge's .csv or LoRA's .txt, also .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "For the loss during training."})
    test_file: str | None = field(default=None, metadata={"help": "Contexts to generate for, with references."})
    max_train_samples: int | None = field(default=None, metadata={"help": "The first rows only."})
    max_test_contexts: int | None = field(default=None, metadata={"help": "The first contexts only."})
    longest_text: int = field(default=LONGEST_TEXT, metadata={"help": "Tokens that are generated at most."})
    repeated: int = field(default=REPEATED, metadata={"help": "So many tokens in a row are generated once only."})
    target_modules: list[str] = field(default_factory=lambda: ["c_attn"], metadata={"help": "Tuned matrices."})
    masked_modules: list[str] | None = field(default=None, metadata={"help": "Matrices that S1 masks as well."})
    r: int = field(default=2, metadata={"help": "Rank of U V, or of LoRA."})
    alpha: float = field(default=16.0, metadata={"help": "Updates are multiplied by alpha / r."})
    nnz: int = field(default=64, metadata={"help": "Entries of S2 in each tuned matrix."})
    dropout: float = field(default=0.1, metadata={"help": "Of the input of U V, or of LoRA."})
    base_sparsity: float = field(default=0.0, metadata={"help": "S1 from the start, by |W0|."})
    sparsity: float = field(default=0.0, metadata={"help": "S1 by the update, between two stages."})


def adapter_of(arguments: Arguments, seed: int) -> PeftConfig | None:
    """The PEFT config of the chosen method; None tunes every weight."""
    where = {"target_modules": arguments.target_modules, "task_type": "CAUSAL_LM"}
    if arguments.method == "lora":
        low_rank = {"r": arguments.r, "lora_alpha": arguments.alpha, "lora_dropout": arguments.dropout}
        return LoraConfig(**low_rank, **where)
    if arguments.method == "full":
        return None
    names = ("r", "alpha", "nnz", "dropout", "masked_modules", "base_sparsity")
    return DseeConfig(**{name: getattr(arguments, name) for name in names}, seed=seed, **where)


def main() -> None:
    """Train, generate and score."""
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**PROTOCOL)
    arguments, training_args = parser.parse_args_into_dataclasses()
    path = arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or path)

    def data(file: str | None, split: str, most: int | None = None) -> Dataset:
        rows = load_e2e(file, None if file else arguments.dataset_name, split)
        return rows if most is None else rows.select(range(min(most, len(rows))))

    train = data(arguments.train_file, "train", arguments.max_train_samples)
    validation = data(arguments.validation_file, "validation")
    test = data(arguments.test_file, "test")
    set_seed(training_args.seed)
    model = AutoModelForCausalLM.from_pretrained(path)
    if (adapter := adapter_of(arguments, training_args.seed)) is not None:
        model = get_peft_model(model, adapter)
    two_stages = arguments.method == "dsee" and arguments.sparsity
    trainer = SparseTrainer(
        model=model,
        args=training_args,
        train_dataset=train.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=train.column_names),
        eval_dataset=validation.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=train.column_names),
        data_collator=functools.partial(collate, end=end_of(tokenizer)),
        processing_class=tokenizer,
        sparsity=DseeTwoStageConfig(arguments.sparsity) if two_stages else None,
    )
    resume = training_args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume == "true" else resume)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics["trained_parameters"] = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    if arguments.method == "dsee":
        metrics["base_sparsity"], metrics["merged_sparsity"] = dsee_sparsity(trainer.model)
    if trainer.is_world_process_zero():
        groups = dict(list(group_references(test).items())[: arguments.max_test_contexts])
        lengths = {"longest": arguments.longest_text, "repeated": arguments.repeated}
        texts = generate(trainer.model.eval(), tokenizer, list(groups), **lengths)
        folder = Path(training_args.output_dir)
        (folder / "hypotheses.txt").write_text("\n".join(texts) + "\n")
        (folder / "references.txt").write_text("\n\n".join("\n".join(group) for group in groups.values()) + "\n")
        try:
            from e2e_scores import score
        except ImportError as missing:
            print(
                f"Not scored, since {missing}: pip install 'sparse_hf[e2e]', then run e2e_scores.py.", file=sys.stderr
            )
        else:
            metrics |= score(texts, list(groups.values()))
        print(json.dumps(metrics, indent=2))
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
