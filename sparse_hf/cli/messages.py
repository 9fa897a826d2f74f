"""How does a user's mistake look in the shell: one sentence, no traceback."""

import functools
from collections.abc import Callable

import typer
from rich.console import Console


console = Console()


def short_errors(command: Callable) -> Callable:
    """Print the message of an error that is the user's to mend, and leave with status 1."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            Console(stderr=True).print(f"[red]Error:[/red] {error}", markup=True, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run
