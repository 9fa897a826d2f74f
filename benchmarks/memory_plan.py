"""Is what `sparse-hf plan` foretells what two training processes hold and send?

    python benchmarks/memory_plan.py [--strategies ddp fsdp2 zero1 zero2 zero3] [--precisions fp32 bf16]

A Llama of 3.2 M weights, gradual pruning, six steps, two gloo processes on CPUs. Measured on the first rank: bytes of
all live tensors inside the optimizer's step; bytes that torch allocates beside while masks change; bytes added up over
ranks to draw them. ZeRO needs DeepSpeed; its buckets are set small: communication buffers are not planned.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from sparse_hf import GradualPruningConfig, SparseTrainer, plan_memory


LOOKED_AT = 4  # a step whose masks change


def build() -> LlamaForCausalLM:
    """Matrices large enough for the selection to sample."""
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


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


def options_of(strategy: str) -> dict:
    """Training arguments that set up the strategy on CPUs."""
    if strategy == "fsdp2":
        # accelerate offers FSDP to several GPUs only; what follows runs on CPUs as well.
        AcceleratorState._reset_state(True)
        PartialState(cpu=True)
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
        fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        fsdp["cpu_ram_efficient_loading"] = False
        return {"fsdp": True, "fsdp_config": fsdp, "accelerator_config": {"use_configured_state": True}}
    if strategy == "ddp":
        return {}
    import deepspeed.comm.torch  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # else it compiles for a minute
    zero = {"stage": int(strategy[-1]), "reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5}
    if strategy == "zero3":
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_param_persistence_threshold": 10**3}
    follow = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    own = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}
    return {"deepspeed": dict.fromkeys(follow, "auto") | own}


def train(strategy: str, precision: str) -> None:
    """One of two processes; the first one prints what it found as JSON."""
    special = options_of(strategy)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, 512, (8,), generator=generator) for _ in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=6, per_device_train_batch_size=2, use_cpu=True, bf16=precision == "bf16",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **special,
        )  # fmt: skip
        rows = [{"input_ids": one, "labels": one} for one in draw]
        sparsity = GradualPruningConfig(sparsity=0.6, end_step=5, every=2)
        trainer = SparseTrainer(model=build(), args=arguments, train_dataset=rows, sparsity=sparsity)
        look = Look(trainer)
        trainer.add_callback(look)
        trainer.train()
        assert trainer.accelerator.num_processes == 2
        masks = sum(mask.numel() for mask in trainer.ticket.masks().values())
    if dist.get_rank() == 0:
        print("FOUND", json.dumps({**look.found, "prunable": masks}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(strategy: str, precision: str) -> dict:
    """Run two processes and read what the first one found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank-of", strategy, precision]
    both = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [one.communicate()[0] for one in both]
    lines = [line for line in told[0].splitlines() if line.startswith("FOUND ")]
    if not lines or any(one.returncode for one in both):
        raise RuntimeError(told[0][-3000:])
    return json.loads(lines[0].removeprefix("FOUND "))


def main() -> None:
    """Print measured and foretold bytes, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        train(*options.rank_of)
        return
    print(f"{'':12}{'held in a step':>34}{'more while masks change':>34}{'added up for masks':>34}")
    print(f"{'':12}" + 3 * f"{'measured':>13}{'planned':>13}{'ratio':>8}")
    for precision in options.precisions:
        for strategy in options.strategies:
            found = measure(strategy, precision)
            plan = plan_memory(build(), strategy, 2, precision=precision)
            # Python does not see DDP's buckets, which hold the gradients once more.
            held = plan.total - (plan.gradients // 2 if strategy == "ddp" else 0)
            pairs = (found["held"], held), (found["update"], plan.mask_update), (found["sums"], plan.sums_sent)
            cells = [f"{one:13,}{other:13,}{one / other if other else 1:8.3f}" for one, other in pairs]
            print(f"{strategy + ' ' + precision:12}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
