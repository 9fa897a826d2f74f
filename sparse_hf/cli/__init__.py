"""`sparse-hf ...`: the library's verbs from the shell."""

import typer

from sparse_hf.cli import (
    compress_commands,
    experts_commands,
    inspect_command,
    plan_command,
    prune_command,
    publish_command,
    ticket_commands,
    upcycle_command,
)
from sparse_hf.cli.messages import short_errors


app = typer.Typer(no_args_is_help=True, help="Sparse training for Hugging Face Transformers.", add_completion=False)
app.add_typer(ticket_commands.app, name="ticket")
app.add_typer(experts_commands.app, name="experts")
app.command("prune")(short_errors(prune_command.prune_folder))
app.command("upcycle")(short_errors(upcycle_command.upcycle_folder))
app.command("inspect")(short_errors(inspect_command.inspect_folder))
app.command("plan")(short_errors(plan_command.plan_training))
app.command("compress")(short_errors(compress_commands.compress))
app.command("decompress")(short_errors(compress_commands.decompress))
app.command("publish")(short_errors(publish_command.publish_folder))
