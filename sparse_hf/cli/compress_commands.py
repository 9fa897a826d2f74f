"""`sparse-hf compress`, `sparse-hf decompress`: a sparse model's folder without the zeros, and back."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_hf.cli.messages import console


def compress(
    folder: Annotated[Path, typer.Argument(help="Folder of a dense safetensors checkpoint with zeros in it.")],
    output: Annotated[Path, typer.Argument(help="New folder, or one with an older compressed checkpoint.")],
    zstd: Annotated[bool, typer.Option("--zstd", help="Code the values too; readers need `zstandard`.")] = False,
) -> None:
    """Write a checkpoint without its zeros; Transformers reads it wherever sparse_hf is imported."""
    from sparse_hf.hub.save_compressed import save_compressed
    from sparse_hf.storage.compressed_checkpoint import read_forms

    forms = read_forms(save_compressed(folder, output, zstd=zstd)).values()
    stored, dense = sum(form.length for form in forms), sum(form.dense_bytes for form in forms)
    console.print(f"{stored:,} bytes of weights instead of {dense:,}: {output}", markup=False, soft_wrap=True)


def decompress(
    folder: Annotated[Path, typer.Argument(help="Folder of a compressed checkpoint.")],
    output: Annotated[Path, typer.Argument(help="New folder for the dense checkpoint.")],
) -> None:
    """Write a compressed checkpoint as a stock one, with its zeros; no model is loaded."""
    from sparse_hf.hub.save_compressed import save_dense

    console.print(f"dense: {save_dense(folder, output)}", markup=False, soft_wrap=True)
