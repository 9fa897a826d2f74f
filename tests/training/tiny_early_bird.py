"""Early-bird searches on a tiny BERT: 2 layers of 4 heads (width 4) and 32 neurons, an epoch of 4 steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.latency_table import LatencyTable
from sparse_hf.training import early_bird_search
from sparse_hf.training.trainer import SparseTrainer
from training.tiny_training import tiny_classifier, tiny_trainer


HEADS, NEURONS = "encoder.layer.{}.heads", "encoder.layer.{}.neurons"
KEYS = [template.format(layer) for layer in (0, 1) for template in (HEADS, NEURONS)]

# Half of the heads of each layer, half of all neurons. A fixed draw, unless a test changes that.
BUDGET = {"heads": 0.5, "neurons": 0.5, "neuron_multiple": 4}
SETTLES = {"check_every": 1, "earliest": 2, "longest": 6, "history": 2, "threshold": 0.5}

# Two layers of 4 heads (1 to 4 s) and 32 neurons (1 s for 4, 8 s for 32), 2 s around them: 2 + 2 * (4 + 8) = 26 s.
LATENCY = LatencyTable(
    heads=(1.0, 2.0, 3.0, 4.0),
    neuron_counts=(4, 32),
    neurons=(1.0, 8.0),
    fixed=2.0,
    layers=2,
    dense=26.0,
    what="training",
    batch=8,
    length=128,
    device="cpu",
    threads=1,
)


def early_bird(**changes: object) -> EarlyBirdConfig:
    """Half of the heads and neurons; the mask settles within a few steps, or the draw is where `draw_at` says."""
    return EarlyBirdConfig(**{**BUDGET, **SETTLES, **changes})


def whole_bert(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A BERT classifier with 4 heads and dropout 0.1."""
    return tiny_classifier(seed, num_attention_heads=4, **changes)


def bird_trainer(
    folder: Path, config: EarlyBirdConfig | None = None, model: PreTrainedModel | None = None, **options: object
) -> SparseTrainer:
    """A trainer whose search is `config`, of 6 steps."""
    return tiny_trainer(folder, config or early_bird(), model=model or whole_bert(), **options)


def fake_latency(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Let nothing be measured; returns what was asked to be."""
    asked = []

    def measure(model, what, batch, length, **options):
        asked.append({"what": what, "batch": batch, "length": length, **options})
        return LATENCY

    monkeypatch.setattr(early_bird_search, "measure_latency", measure)
    return asked


def sliced(start: dict[str, Tensor], units: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a tiny BERT's tensors are once it has only these heads and neurons, worked out by hand."""
    expected = dict(start)
    for layer in (0, 1):
        rows = units[HEADS.format(layer)].repeat_interleave(4)
        neurons = units[NEURONS.format(layer)]
        path = f"bert.encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                full = f"{path}attention.self.{name}.{kind}"
                expected[full] = start[full][rows]
        for full in (f"{path}intermediate.dense.weight", f"{path}intermediate.dense.bias"):
            expected[full] = start[full][neurons]
        expected[f"{path}attention.output.dense.weight"] = start[f"{path}attention.output.dense.weight"][:, rows]
        expected[f"{path}output.dense.weight"] = start[f"{path}output.dense.weight"][:, neurons]
    return expected


def settles_at(
    steps: list[int], distances: list[list[float]], tied: list[bool], config: EarlyBirdConfig
) -> int | None:
    """The first step whose mask is near all of the `history - 1` before it, none of them early or tied."""
    counted: list[int] = []
    for number, step in enumerate(steps):
        if tied[number]:
            counted = []
        elif step >= config.earliest:
            counted = [*counted, number][-config.history :]
        if len(counted) == config.history and max(distances[number][one] for one in counted) <= config.threshold:
            return step
    return None


class Recorder(TrainerCallback):
    """Keeps every log record, and at the begin of every training the model's class, its tensors, and the stage."""

    def __init__(self) -> None:
        self.logs: list[dict] = []
        self.begins: list[tuple[type, dict[str, Tensor]]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.begins.append((type(model), values))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def equal_logits(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Whether both give the same logits, bit for bit, in eval mode."""
    ids = torch.arange(3, 27).reshape(4, 6)
    with torch.no_grad():
        return torch.equal(first.eval()(input_ids=ids).logits, second.eval()(input_ids=ids).logits)
