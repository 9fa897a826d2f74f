"""How does a user's mistake look in the shell: one sentence, no traceback."""

import functools
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape


console = Console()


def short_errors(command: Callable) -> Callable:
    """Print the message of an error that is the user's to mend, and leave with status 1."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            message = f"[red]Error:[/red] {escape(str(error))}"  # what is in brackets belongs to the message
            Console(stderr=True).print(message, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run
