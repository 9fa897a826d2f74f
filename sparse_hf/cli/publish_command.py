"""`sparse-hf publish`: a folder goes to the Hub with a card."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_hf.cli.messages import console


def publish_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, a ticket or an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Hub id, e.g. me/bert-sst2-60.")],
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Without the zeros, readable where sparse_hf is imported.")
    ] = False,
    zstd: Annotated[bool, typer.Option("--zstd", help="As `--compressed`, with the values coded by zstd.")] = False,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload by sparse_hf",
) -> None:
    """Upload a folder with a model card as one commit; older weights of the other kind are deleted by it."""
    from sparse_hf.cards.publish import publish

    address = publish(
        folder, repo_id, private=private, commit_message=message, compressed="zstd" if zstd else compressed
    )
    console.print(address, markup=False, soft_wrap=True)
