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
from unsloth.cli import data_group, eval_group, screen
from unsloth.cli.arguments import Changes, ConfigFile, ModelName, Precision, RemoteCode
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
app.add_typer(eval_group.app, name="eval")
app.add_typer(data_group.app, name="data")


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
    method: Annotated[
        str, typer.Option(help="merged_16bit: a standalone model; merged_4bit_forced: in 4 bits; lora: the adapter.")
    ] = "merged_16bit",
    precision: Precision = None,
    scale: Annotated[float, typer.Option(help="Factor on the adapter's alpha; 0.5 halves what it changes.")] = 1.0,
    base_weight: Annotated[
        float, typer.Option(min=0, help="Share of the base model in an average of the weights, such as 0.5.")
    ] = 0.0,
    further: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="FOLDER=WEIGHT", help="A further adapter on the same base; may be repeated."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file; default: 5GB, or one file for each GGUF type.")
    ] = None,
    maximum_memory_usage: Annotated[
        float, typer.Option(help="Share of the free memory that the reloaded model may take.")
    ] = 0.75,
    push_to: Annotated[str | None, typer.Option(help="Hub repository to upload the result to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written and how large it is; load no weights.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="safetensors, or gguf for llama.cpp and Ollama.")
    ] = "safetensors",
    quantization: Annotated[
        list[str] | None,
        typer.Option("--quantization", "-q", help="GGUF: such as q4_k_m, dynamic_q4_k_xl, f16; may be repeated."),
    ] = None,
    imatrix: Annotated[str | None, typer.Option(help="GGUF: an importance matrix in llama.cpp's format.")] = None,
    data: Annotated[
        str | None, typer.Option(help="GGUF: rows to measure the importance of inputs on; default: what ships.")
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model or adapter in another form."""
    if form not in ("safetensors", "gguf"):
        raise ConfigError("unknown --format", got=form, do="Use safetensors or gguf.")
    if form == "gguf":
        from unsloth.cli import export_gguf

        gguf_options = export_gguf.GgufOptions(
            name=model,
            out=out,
            methods=tuple(quantization or ("fast_quantized",)),
            imatrix=imatrix,
            data=data,
            adapter_only=method == "lora",
            precision=precision,
            adapter_scale=scale,
            base_weight=base_weight,
            further=tuple(further or ()),
            max_shard_size=max_shard_size,
            maximum_memory_usage=maximum_memory_usage,
            push_to=push_to,
            public=public,
            trust_remote_code=trust_remote_code,
        )
        (export_gguf.dry_run if dry_run else export_gguf.export)(gguf_options)
        return
    from unsloth.cli import run_config

    if method not in run_config.EXPORT_METHODS:
        raise ConfigError("unknown --method", got=method, do=f"Use one of: {', '.join(run_config.EXPORT_METHODS)}.")
    from unsloth.cli import export as command

    options = command.ExportOptions(
        name=model,
        out=out,
        method=method,
        precision=precision,
        adapter_scale=scale,
        base_weight=base_weight,
        further=tuple(further or ()),
        max_shard_size=max_shard_size or "5GB",
        maximum_memory_usage=maximum_memory_usage,
        push_to=push_to,
        public=public,
        trust_remote_code=trust_remote_code,
    )
    (command.dry_run if dry_run else command.export)(options)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_GGUF", help="What was saved: a folder or a .gguf file.")],
    against: Annotated[str, typer.Option(help="The original model: a folder or hub id.")],
    adapter: Annotated[str | None, typer.Option(help="The folder of the adapter that was merged into it.")] = None,
    precision: Precision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say whether a saved model is the original, and if not, why: template, tokens, base, tensors, predictions."""
    from unsloth.cli import verify as command

    options = command.VerifyOptions(target, against, adapter, precision, trust_remote_code)
    if not command.verify(options):
        raise typer.Exit(1)


@app.command()
def imatrix(
    model: ModelName,
    out: Annotated[str, typer.Argument(metavar="FILE", help="The .gguf or .dat file to write.")],
    data: Annotated[
        str | None, typer.Option(help="Rows to measure on, in any layout that can be trained on; default: what ships.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to take of them.")] = 16_384,
    precision: Precision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure an importance matrix, for quantizers that ask for one."""
    from unsloth.cli import imatrix as command

    command.imatrix(
        command.ImatrixOptions(
            name=model, out=out, data=data, tokens=tokens, precision=precision, trust_remote_code=trust_remote_code
        )
    )


@app.command()
def serve(
    model: ModelName,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; default: its folder's.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Serve this adapter too; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        str | None, typer.Option(help="File with the API key; default: UNSLOTH_API_KEY, or a new key.")
    ] = None,
    no_api_key: Annotated[bool, typer.Option("--no-api-key", help="Ask for no key; only on this machine.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further host name of this server; may be repeated.")
    ] = None,
    adapter_folder: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Requests may load adapters from here; default: they may not.")
    ] = None,
    max_seq_length: Annotated[int, typer.Option(min=1, help="Longest prompt and answer in tokens.")] = 4096,
    max_requests: Annotated[int, typer.Option(min=1, help="Completions in flight, running or queued.")] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long requests in flight may go on at the end.")
    ] = 30.0,
    memory: Annotated[float, typer.Option(min=0.05, max=1, help="Share of the GPU's memory to use.")] = 0.85,
    precision: Precision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Serve a model and adapters through the OpenAI interface."""
    from unsloth.cli import serve as command

    command.serve(
        command.ServeCommand(
            model=model,
            name=name,
            adapters=tuple(adapter or ()),
            host=host,
            port=port,
            key_file=api_key_file,
            no_key=no_api_key,
            allowed_hosts=tuple(allow_host or ()),
            adapter_folder=adapter_folder,
            max_seq_length=max_seq_length,
            max_requests=max_requests,
            drain_seconds=drain_seconds,
            memory=memory,
            precision=precision,
            trust_remote_code=trust_remote_code,
        )
    )


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
