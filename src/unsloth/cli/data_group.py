"""`unsloth data COMMAND`: its commands and their arguments; what they do is in :mod:`unsloth.cli.data`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Look at data sets, split, clean and mix them.", no_args_is_help=True)

DataSource = Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder, or a hub id.")]
OutFolder = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of choice and order.")]


@app.command()
def show(
    file: DataSource,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and template: a folder or hub id; default: SmolLM2's.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="A chat template by name, such as llama-3.1.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 3,
    responses_only: Annotated[
        bool, typer.Option("--responses-only", help="As if only the assistant's turns were trained.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(min=2, help="Count rows that are longer, in tokens.")] = None,
    layout: Annotated[str | None, typer.Option(help="What the rows are, if it is not recognized.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or saved folder.")] = "train",
) -> None:
    """Print rows as they are trained, trained tokens in color, and what the data set amounts to."""
    from unsloth.cli import data as command

    command.show(
        command.ShowOptions(
            source=file,
            model=model,
            template=template,
            rows=rows,
            responses_only=responses_only,
            max_length=max_length,
            layout=layout,
            split=split,
        )
    )


@app.command("split")
def split_data(
    file: DataSource,
    out: OutFolder,
    heldout: Annotated[float, typer.Option(help="The share that is held out.")] = 0.1,
    seed: Seed = 3407,
) -> None:
    """Shuffle and split into OUT/train.jsonl and OUT/heldout.jsonl; equal rows stay on one side."""
    from unsloth.cli import data as command

    command.split(file, out, heldout=heldout, seed=seed)


@app.command()
def dedup(file: DataSource, out: OutFolder) -> None:
    """Leave out rows that repeat an earlier one; the rest goes into OUT/rows.jsonl."""
    from unsloth.cli import data as command

    command.deduplicate(file, out)


@app.command()
def mix(
    files: Annotated[list[str], typer.Argument(metavar="FILE=WEIGHT...", help="Files with the share of each.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="The folder to write.")],
    seed: Seed = 3407,
) -> None:
    """Mix data sets by weight into OUT/rows.jsonl, such as: mix reasoning.jsonl=75 chat.jsonl=25 --out mixed."""
    from unsloth.cli import data as command

    command.mix(files, out, seed=seed)
