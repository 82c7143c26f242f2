"""The command line: `unsloth COMMAND`.

Each command has a file of its own, which is imported when the command is carried out: `unsloth --help` and
mistakes in a configuration file must not wait for torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from rich.markup import escape

import unsloth
from unsloth.cli import screen
from unsloth.core import settings
from unsloth.core.errors import ConfigError, UnslothError

_DEBUG = "--debug"
_INTERRUPTED = 130

app = typer.Typer(
    name="unsloth",
    help="Fine-tune open language models on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at data sets, split, clean and mix them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DataSource = Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder, or a hub id.")]
OutFolder = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of choice and order.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The file that describes the run.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the file; may be repeated."),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, an adapter's folder, or a hub id.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run code of its own.")
]
Precision = Annotated[
    str | None, typer.Option(help="How to hold the base weights: 4bit, 8bit or 16bit.", show_default=False)
]


def _print_version(value: bool) -> None:
    if value:
        print(f"unsloth {unsloth.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show where in the program an error arose.")] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile,
    changes: Changes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first row, the steps and the memory needed; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune a model as a YAML file describes."""
    from unsloth.cli import run_config

    run = run_config.read(config, changes or ())
    from unsloth.cli import train as command

    if dry_run:
        command.dry_run(run, trust_remote_code=trust_remote_code)
    else:
        command.train(run, resume=resume, trust_remote_code=trust_remote_code)


@app.command()
def chat(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 always takes the most probable token; default: the model's own.")
    ] = None,
    precision: Precision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a model. /quit ends, /reset forgets, /system TEXT sets the system message."""
    from unsloth.cli import chat as command

    options = command.ChatOptions(
        model=model,
        prompt=prompt,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        precision=precision,
        trust_remote_code=trust_remote_code,
    )
    command.chat(options)


@app.command()
def export(
    model: ModelName,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[str, typer.Option(help="merged_16bit: a standalone model; lora: the adapter.")] = "merged_16bit",
    precision: Precision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model or adapter in another form."""
    from unsloth.cli import run_config

    if method not in run_config.SAVE_METHODS:
        raise ConfigError("unknown --method", got=method, do=f"Use {' or '.join(run_config.SAVE_METHODS)}.")
    from unsloth.cli import export as command

    command.export(model, out, method=method, precision=precision, trust_remote_code=trust_remote_code)


@app.command()
def estimate(
    config: ConfigFile,
    changes: Changes = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to fit into, such as 24GB; default: what is free here.")
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say how much memory a run needs, and what would fit. Loads no weights."""
    from unsloth.cli import run_config

    run = run_config.read(config, changes or ())
    limit = run_config.parse_memory(memory) if memory is not None else None
    from unsloth.cli import estimate as command

    command.estimate(run, limit, trust_remote_code=trust_remote_code)


@data_app.command()
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


@data_app.command("split")
def split_data(
    file: DataSource,
    out: OutFolder,
    heldout: Annotated[float, typer.Option(help="The share that is held out.")] = 0.1,
    seed: Seed = 3407,
) -> None:
    """Shuffle and split into OUT/train.jsonl and OUT/heldout.jsonl; equal rows stay on one side."""
    from unsloth.cli import data as command

    command.split(file, out, heldout=heldout, seed=seed)


@data_app.command()
def dedup(file: DataSource, out: OutFolder) -> None:
    """Leave out rows that repeat an earlier one; the rest goes into OUT/rows.jsonl."""
    from unsloth.cli import data as command

    command.deduplicate(file, out)


@data_app.command()
def mix(
    files: Annotated[list[str], typer.Argument(metavar="FILE=WEIGHT...", help="Files with the share of each.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="The folder to write.")],
    seed: Seed = 3407,
) -> None:
    """Mix data sets by weight into OUT/rows.jsonl, such as: mix reasoning.jsonl=75 chat.jsonl=25 --out mixed."""
    from unsloth.cli import data as command

    command.mix(files, out, seed=seed)


@app.command()
def doctor() -> None:
    """Check this machine: versions, GPU, what is fast and what is not, and why."""
    from unsloth.cli import doctor as command

    if not command.doctor():
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List what can be loaded by name."""
    from unsloth.cli import models as command

    command.models()


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
    """Entry point of the `unsloth` command: runs it, and turns errors into one clear sentence.

    Ends the process with 2 for a mistake in how the command was called or configured, 130 after Ctrl-C, and 1 for
    any other failure.
    """
    settings.share_processors_politely()
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    debug = len(arguments) < len(sys.argv) - 1  # accepted at any place
    try:
        code = app(arguments, standalone_mode=False)
    except Exception as error:  # noqa: BLE001 (the outermost frame)
        code = _report(error, debug)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        screen.console(stderr=True).print("\nInterrupted.")
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, debug: bool) -> int:
    """Print what went wrong; return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `unsloth models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(error)
    if hasattr(error, "format_message") and hasattr(error, "show"):  # typer's own, about the arguments
        error.show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":  # how older versions of typer pass on Ctrl-C
        return _INTERRUPTED
    if isinstance(error, UnslothError):
        _print_error(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    lines = str(error).strip().splitlines() or ["no message"]
    _print_error(f"{type(error).__name__}: {lines[0][:300]}")
    if not debug:
        screen.console(stderr=True).print("This was not foreseen. Run the command again with --debug to see where.")
    return 1


def _print_error(message: str) -> None:
    screen.console(stderr=True).print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)


if __name__ == "__main__":
    main()
