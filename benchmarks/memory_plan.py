"""Is what `sparse-hf plan` foretells what two training processes hold and send?

    python benchmarks/memory_plan.py [--strategies ddp fsdp2 zero1 zero2 zero3] [--precisions fp32 bf16]

A Llama of 3.2 M weights, gradual pruning, six steps, two gloo processes on CPUs. Measured on the first rank: bytes of
all live tensors inside the optimizer's step; bytes that torch allocates beside while masks change; bytes added up over
ranks to draw them. ZeRO needs DeepSpeed; its buckets are set small: communication buffers are not planned.
"""

import argparse
import gc
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from two_trainings import STRATEGIES, build, found_by_two, report, trainer_of

from sparse_hf import GradualPruningConfig, SparseTrainer, plan_memory


LOOKED_AT = 4  # a step whose masks change


def live_bytes() -> int:
    """Of all tensors that Python knows, each storage once; counters and ids are left out."""
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter, DTensor) or isinstance(one, torch.nn.Parameter):
            for tensor in (one, one.grad if one.is_leaf else None):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                if local is not None and local.device.type != "meta" and local.dtype != torch.int64:
                    storage = local.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def peak_of(function, *arguments: object, **named: object) -> int:
    """The most bytes that torch had allocated at once since the call began, less those freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments, **named)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Look(TrainerCallback):
    """Measures one step of a trainer whose masks change in it."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.found = {"held": 0, "update": 0, "sums": 0}
        self._changing = False
        callback = trainer._sparsity_callback
        self._change, callback.on_optimizer_step = callback.on_optimizer_step, self._measured_change
        self._add, dist.all_reduce = dist.all_reduce, self._counted

    def on_train_begin(self, args, state, control, optimizer, **kwargs) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._look(state))

    def _look(self, state) -> None:
        if state.global_step == LOOKED_AT - 1:
            self.found["held"] = max(self.found["held"], live_bytes())

    def _measured_change(self, args, state, control, **kwargs) -> None:
        self._changing = state.global_step == LOOKED_AT - 1
        if self._changing:
            self.found["update"] = peak_of(self._change, args, state, control, **kwargs)
        else:
            self._change(args, state, control, **kwargs)
        self._changing = False

    def _counted(self, *arguments, **named):
        tensor = arguments[0] if arguments else named["tensor"]
        self.found["sums"] += tensor.numel() * tensor.element_size() if self._changing else 0
        return self._add(*arguments, **named)


def train(strategy: str, precision: str) -> None:
    """In one of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        sparsity = GradualPruningConfig(sparsity=0.6, end_step=5, every=2)
        trainer = trainer_of(folder, strategy, build(), sparsity, max_steps=6, bf16=precision == "bf16")
        look = Look(trainer)
        trainer.add_callback(look)
        trainer.train()
    report(look.found)


def main() -> None:
    """Print measured and foretold bytes, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        train(*options.rank_of)
        return
    print(f"{'':12}{'held in a step':>34}{'more while masks change':>34}{'added up for masks':>34}")
    print(f"{'':12}" + 3 * f"{'measured':>13}{'planned':>13}{'ratio':>8}")
    for precision in options.precisions:
        for strategy in options.strategies:
            found = found_by_two(__file__, "--rank-of", strategy, precision)
            plan = plan_memory(build(), strategy, 2, precision=precision)
            # Python does not see DDP's buckets, which hold the gradients once more.
            held = plan.total - (plan.gradients // 2 if strategy == "ddp" else 0)
            pairs = (found["held"], held), (found["update"], plan.mask_update), (found["sums"], plan.sums_sent)
            cells = [f"{one:13,}{other:13,}{one / other if other else 1:8.3f}" for one, other in pairs]
            print(f"{strategy + ' ' + precision:12}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
