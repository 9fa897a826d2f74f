"""`sparse-hf upcycle`: a dense checkpoint becomes a mixture of experts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_hf.cli.messages import console


if TYPE_CHECKING:
    import numpy as np


def upcycle_folder(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint in safetensors.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the mixture of experts.")],
    experts: Annotated[int, typer.Option(help="Copies of each FFN; cut further by --granularity.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    target: Annotated[
        str | None, typer.Option(help="Model type of the mixture, where several are exact, as glm4_moe for a Llama.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that become mixtures, as 4-31, every-2 or 0,3,5-7; default: all.")
    ] = None,
    granularity: Annotated[int, typer.Option(help="Experts that each copy is cut into.")] = 1,
    shared_half: Annotated[bool, typer.Option("--shared-half", help="Half of each FFN serves every token.")] = False,
    scale: Annotated[str, typer.Option(help="Where parts are scaled: down (exact) or spread.")] = "down",
    drop: Annotated[float, typer.Option(help="Fraction of each expert's neurons drawn anew (Drop-Upcycling).")] = 0.0,
    noise_std: Annotated[float, typer.Option(help="Standard deviation of noise added to every expert.")] = 0.0,
    branch: Annotated[
        list[str] | None, typer.Option(help="A model fine-tuned from the source whose FFNs become experts; repeat it.")
    ] = None,
    average: Annotated[bool, typer.Option("--average", help="Average what else the branches hold.")] = False,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the routers' start; 0 for zeros.")] = 0.02,
    router: Annotated[
        str | None, typer.Option(help="top_k, cosine, expert_choice or hash; for GPT-2, BERT, RoBERTa, ViT and T5.")
    ] = None,
    router_bias: Annotated[
        bool, typer.Option("--router-bias", help="Routers have a bias of the choice, for balancing without a loss.")
    ] = False,
    capacity_factor: Annotated[
        float | None, typer.Option(help="What an expert takes, in even shares of the tokens.")
    ] = None,
    router_samples: Annotated[
        Path | None, typer.Option(help="JSON of texts by domain, to fit the routers to, in the memory of one layer.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Copy tied embeddings, for engines that do not tie them (SGLang).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all random numbers and of the check's tokens.")] = 0,
    check_tokens: Annotated[int, typer.Option(help="Tokens to compare the logits on; 0 skips that.")] = 256,
    plan_only: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Write a native mixture of experts made of a dense checkpoint, by default of copies; a killed run goes on."""
    from sparse_hf.moe.expert_init import ExpertInit
    from sparse_hf.moe.mixture_routers import RouterConfig
    from sparse_hf.moe.plan_upcycling import plan_upcycling
    from sparse_hf.moe.upcycle import carry_out

    own_router = router is not None or router_bias or capacity_factor is not None
    plan = plan_upcycling(
        source,
        destination,
        experts,
        top_k,
        layers=layers,
        router_std=router_std,
        seed=seed,
        target=target,
        init=ExpertInit(granularity, shared_half, scale, drop, noise_std),
        branches=branch or (),
        average=average,
        router_rows=None if router_samples is None else fitted_rows(source, router_samples),
        router=RouterConfig(router or "top_k", router_bias, capacity_factor) if own_router else None,
        untie=untie,
    )
    console.print(str(plan), markup=False, soft_wrap=True)
    if plan_only:
        return
    difference = carry_out(plan, check_tokens, seed=seed)
    if not (destination / "config.json").is_file():
        console.print(f"{destination}: other processes still write; the last one completes it", markup=False)
        return
    if difference is None:
        checked = "logits not compared"
    elif plan.changed:
        checked = f"logits differ by {difference:.2g} of the largest on {check_tokens} tokens"
    else:
        checked = f"logits equal on {check_tokens} tokens"
    console.print(f"{destination}: written, {checked}", markup=False, soft_wrap=True)


def fitted_rows(source: str, samples: Path) -> "dict[int, np.ndarray]":
    """Router rows fitted to a file of samples, telling what they are worth.

    Raises:
        ValueError: the file does not hold texts by domain.
    """
    from sparse_hf.moe.fit_routers import fit_routers

    content = json.loads(samples.read_text())
    texts = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in texts):
        raise ValueError(f'`{samples}` must hold texts by domain, as {{"code": ["def f(): ..."], "poems": [...]}}.')
    fitted = fit_routers(source, content, progress=True)
    shares = ", ".join(f"{share:.2f}" for share in fitted.accuracy.values())
    console.print(f"routers fitted: held-out tokens told apart by layer {shares}, chance {1 / len(content):.2f}")
    return fitted.rows
