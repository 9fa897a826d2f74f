"""How good are the weights that a training left behind?"""

import math
from pathlib import Path

from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerState, TrainingArguments

from sparse_hf.algorithms.sharded_tensors import local_part
from sparse_hf.anatomy.canonical_names import named_canonical_parameters


TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second")


def metrics_of_weights(state: TrainerState, arguments: TrainingArguments) -> dict[str, float | None]:
    """The last evaluation in the Trainer's log, or the best one if its weights were loaded; of all evaluation sets.

    Timings are left out, and NaN and infinities are None, which JSON can hold.
    """
    records = [record for record in state.log_history if any(name.startswith("eval_") for name in record)]
    if not records:
        return {}
    loaded_best = arguments.load_best_model_at_end and state.best_model_checkpoint is not None
    step = state.best_global_step if loaded_best else records[-1]["step"]
    evaluation = {name: value for record in records if record["step"] == step for name, value in record.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in evaluation.items()
        if name.startswith("eval_") and not name.endswith(TIMINGS)
    }


def check_finite(model: nn.Module, loss: float, number: int, folder: Path) -> None:
    """Raise ValueError if round `number`, whose checkpoints are in `folder`, ended with NaN or infinities.

    The Trainer's `logging_nan_inf_filter` hides NaN from the loss, so the weights are looked at too. A rank knows the
    loss of its own batches, and where parameters are sharded its own part of them; all ranks stop together.
    """
    parameters = named_canonical_parameters(model).items()
    here = next((name for name, parameter in parameters if not local_part(parameter).isfinite().all()), None)
    seen = gather_object([(here, loss)])
    broken = next((name for name, _ in seen if name is not None), None)
    loss = next((one for _, one in seen if not math.isfinite(one)), loss)
    if broken is not None or not math.isfinite(loss):
        found = f"a training loss of {loss}" if broken is None else f"NaN or infinite weights in `{broken}`"
        raise ValueError(
            f"Round {number} ended with {found}, so its weights say nothing. Lower the learning rate or check "
            f"the data, delete `{folder}`, and resume; finished rounds are kept."
        )
