"""How good are the weights that a training left behind?"""

import math

from transformers import TrainerState, TrainingArguments


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
