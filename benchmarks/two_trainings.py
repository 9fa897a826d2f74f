"""What benchmarks of many processes share: two gloo processes on CPUs that train a small Llama under a strategy."""

import contextlib
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
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sparse_hf import GradualPruningConfig, SparseTrainer


STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def build(hidden: int = 256, layers: int = 4) -> LlamaForCausalLM:
    """A Llama of 3.2 million weights, unless another size is asked for."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, num_key_value_heads=2, **shape))


def trainer_of(
    folder: str,
    strategy: str,
    model: LlamaForCausalLM,
    sparsity: GradualPruningConfig | None,
    *,
    length: int = 8,
    batch: int = 2,
    **options: object,
) -> SparseTrainer:
    """A trainer in one of two processes, on rows of random tokens."""
    special = options_of(strategy)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": one, "labels": one} for one in torch.randint(0, 512, (64, length), generator=generator)]
    own = {"per_device_train_batch_size": batch, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    own |= {"save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(folder, **own, **special, **options)
    trainer = SparseTrainer(model=model, args=arguments, train_dataset=rows, sparsity=sparsity)
    assert trainer.accelerator.num_processes == 2
    return trainer


def options_of(strategy: str) -> dict:
    """Training arguments that set up the strategy on CPUs."""
    if strategy == "ddp":
        return {}
    AcceleratorState._reset_state(True)
    if strategy == "fsdp2":
        # accelerate offers FSDP to several GPUs only; what follows runs on CPUs as well.
        PartialState(cpu=True)
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
        fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        fsdp["cpu_ram_efficient_loading"] = False
        return {"fsdp": True, "fsdp_config": fsdp, "accelerator_config": {"use_configured_state": True}}
    import deepspeed.comm.torch  # noqa: F401
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # else it compiles for a minute
    zero = {"stage": int(strategy[-1]), "reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5}
    if strategy == "zero3":
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_param_persistence_threshold": 10**3}
    follow = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    own = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}
    return {"deepspeed": dict.fromkeys(follow, "auto") | own}


def report(found: dict) -> None:
    """Called by both processes at their end: the first one tells the script what it found."""
    if dist.get_rank() == 0:
        print("FOUND", json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def found_by_two(script: str, *words: str) -> dict:
    """Run `script` with these arguments in two processes; what the first one reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    told, both = [], []
    with contextlib.ExitStack() as files:
        for rank in (0, 1):
            # Files, since a pipe that nobody reads yet would stop its process, and the other with it.
            told.append(files.enter_context(tempfile.TemporaryFile("w+")))
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, script, *words]
            both.append(subprocess.Popen(command, env=environment, stdout=told[-1], stderr=subprocess.STDOUT))
        codes = [one.wait() for one in both]
        for one in told:
            one.seek(0)
        told = [one.read() for one in told]
    lines = [line for line in told[0].splitlines() if line.startswith("FOUND ")]
    if not lines or any(codes):
        raise RuntimeError(told[codes[0] == 0][-3000:])
    return json.loads(lines[0].removeprefix("FOUND "))
