"""`sparse-hf upcycle`: a dense checkpoint becomes a mixture of experts."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_hf.cli.messages import console


def upcycle_folder(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint in safetensors.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the mixture of experts.")],
    experts: Annotated[int, typer.Option(help="Experts of every mixture.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    target: Annotated[
        str | None, typer.Option(help="Model type of the mixture, where several are exact, as glm4_moe for a Llama.")
    ] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the routers' start; 0 for zeros.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of the routers and of the check's tokens.")] = 0,
    check_tokens: Annotated[int, typer.Option(help="Tokens to compare the logits on; 0 skips that.")] = 256,
    plan_only: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Write a native mixture of experts whose experts are copies of the dense FFN; a killed run goes on."""
    from sparse_hf.moe.upcycle import carry_out, plan_upcycling

    plan = plan_upcycling(source, destination, experts, top_k, router_std=router_std, seed=seed, target=target)
    console.print(str(plan), markup=False, soft_wrap=True)
    if plan_only:
        return
    carry_out(plan, check_tokens, seed=seed)
    if not (destination / "config.json").is_file():
        console.print(f"{destination}: other processes still write; the last one completes it", markup=False)
        return
    checked = f"logits equal on {check_tokens} tokens" if check_tokens else "logits not compared"
    console.print(f"{destination}: written, {checked}", markup=False, soft_wrap=True)
