"""The command line: `unsloth COMMAND`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import unsloth
from unsloth.core import settings
from unsloth.core.errors import UnslothError

app = typer.Typer(
    name="unsloth",
    help="Fine-tune open language models on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        print(f"unsloth {unsloth.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for everything that the demo makes.")] = "demo_output",
    steps: Annotated[int, typer.Option(help="Training steps of 8 rows each.", min=1)] = 56,
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the order of the rows.")] = 3407,
) -> None:
    """Fine-tune a small real model on a data set that ships with this package, and show what changed."""
    from unsloth.cli.demo import DemoOptions, run

    run(DemoOptions(output=output, steps=steps, seed=seed))


@app.command()
def checkpoints(
    folder: Annotated[str, typer.Argument(help="The output folder of a run.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare it with its manifest.")] = False,
    prune: Annotated[int | None, typer.Option(help="Delete all but this many whole ones, and the best.")] = None,
) -> None:
    """List the checkpoints of a run."""
    from unsloth.cli.checkpoints import CheckpointsOptions, run

    run(CheckpointsOptions(folder=folder, verify=verify, prune=prune))


def main() -> None:
    """Entry point of the `unsloth` command: runs it, and turns this library's errors into one clear sentence."""
    settings.share_processors_politely()
    try:
        app()
    except UnslothError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
