"""Two processes with different data search as one: equal coefficients, masks and weights on both."""

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparse_hf.tickets.structured_ticket import StructuredTicket
from sparse_hf.training import early_bird_search
from training.tiny_early_bird import KEYS, bird_trainer, early_bird, whole_bert
from training.tiny_training import AtStep, assert_same, same, tensors
from training.two_processes import run_two


CONFIG = early_bird(draw_at=3, l1=0.05)
# Two processes with two rows each take the batches that one process with four takes.
OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "sgd", "learning_rate": 0.2}
OPTIONS |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
# Else the Trainer multiplies BERT's loss, a mean over rows, by the number of processes.
OPTIONS |= {"average_tokens_across_devices": False}


def trainer_of(folder, rows_per_process, **options):
    # Large weights, so that the coefficients matter; without dropout, which would differ from that of one process.
    model = whole_bert(initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {**OPTIONS, "per_device_train_batch_size": rows_per_process, **options}
    return bird_trainer(folder, CONFIG, model, **options)


def run_one_process(folder: str) -> None:
    """What each of the two processes does: train, and write down what it came to and which rows it saw."""
    rank, rows, looks = int(os.environ["RANK"]), [], []
    trainer = trainer_of(Path(folder) / "run", 2, ddp_backend="gloo")
    open_journal = early_bird_search.open_journal

    def late(*args):
        """The second process is slow to look whether the folder is free."""
        time.sleep(rank)
        return open_journal(*args)

    early_bird_search.open_journal = late
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        rows.append(inputs["input_ids"].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    def look(model, **_):
        if hasattr(inner := getattr(model, "module", model), "sparse_hf_coefficients"):
            looks.append([one.detach().clone() for one in inner.sparse_hf_coefficients.parameters()])

    trainer.compute_loss = watched
    trainer.add_callback(AtStep(look))
    trainer.train()
    found = {f"weight.{name}": tensor.contiguous() for name, tensor in tensors(trainer.model).items()}
    found |= {f"mask.{key}": mask for key, mask in trainer.ticket.units.items()}
    for step, values in enumerate(looks):
        found |= {f"coefficient.{step}.{key}": value for key, value in zip(KEYS, values, strict=True)}
    save_file(found, Path(folder) / f"rank-{rank}.safetensors")
    facts = {"rows": rows, "steps": trainer.search.steps, "world": trainer.args.world_size}
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(facts))


def both(folder: Path) -> list[tuple[dict, dict]]:
    """Tensors and facts of both processes."""
    run_two("training.test_early_bird_ddp", "run_one_process", folder)
    files = [folder / f"rank-{rank}" for rank in (0, 1)]
    return [(load_file(f"{one}.safetensors"), json.loads(Path(f"{one}.json").read_text())) for one in files]


def part(found: dict, kind: str) -> dict:
    return {name.removeprefix(f"{kind}."): one for name, one in found.items() if name.startswith(f"{kind}.")}


def test_both_processes_come_to_the_same(tmp_path):
    (first, facts), (second, other_facts) = both(tmp_path)
    assert facts["world"] == 2
    assert facts["steps"] == other_facts["steps"] == [1, 2, 3]
    assert len(facts["rows"]) == len(other_facts["rows"]) == 8
    assert facts["rows"] != other_facts["rows"]
    assert_same(first, second)
    coefficients = part(first, "coefficient")
    assert len(coefficients) == 3 * len(KEYS)
    assert not same(part(coefficients, "0"), part(coefficients, "2"))
    # The files are there once and say the same.
    ticket = StructuredTicket.from_pretrained(tmp_path / "run" / "ticket")
    assert_same(ticket.units, part(first, "mask"))
    assert_same(load_file(tmp_path / "run" / "coefficients.safetensors"), part(part(first, "coefficient"), "2"))
    # One process with the same batches: the coefficients' gradients are averaged, their penalty is added once.
    alone = trainer_of(tmp_path / "alone", 4)
    alone.train()
    expected = load_file(tmp_path / "alone" / "coefficients.safetensors")
    for key, value in part(coefficients, "2").items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-6), key
        assert value.std() > 1e-3  # the task moved it too
    assert_same(alone.ticket.units, part(first, "mask"))
    for name, value in tensors(alone.model).items():
        assert torch.allclose(part(first, "weight")[name], value, rtol=0, atol=1e-5), name
