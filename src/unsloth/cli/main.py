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

evaluation = typer.Typer(
    name="eval", help="Measure a model: against another one, or on questions.", no_args_is_help=True
)
app.add_typer(evaluation)
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
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
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

        if dry_run or further or scale != 1.0 or base_weight:
            raise ConfigError("--dry-run, --with, --scale and --base-weight do not work with --format gguf")
        export_gguf.export(
            export_gguf.GgufOptions(
                name=model,
                out=out,
                methods=tuple(quantization or ("fast_quantized",)),
                imatrix=imatrix,
                data=data,
                adapter_only=method == "lora",
                precision=precision,
                maximum_memory_usage=maximum_memory_usage,
                push_to=push_to,
                public=public,
                trust_remote_code=trust_remote_code,
            )
        )
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
        max_shard_size=max_shard_size,
        maximum_memory_usage=maximum_memory_usage,
        push_to=push_to,
        public=public,
        trust_remote_code=trust_remote_code,
    )
    (command.dry_run if dry_run else command.export)(options)


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


EvalPrecision = Annotated[str, typer.Option("--precision", help="How to hold base weights: 4bit, 8bit or 16bit.")]
EvalTokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Where the tokenizer is, if no model has one, as GGUF files.")
]
EvalBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences computed at once.")]
EvalOutput = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the results to a file.")]
Scored = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, an adapter's folder, a hub id, or a .gguf file.")
]


@evaluation.command("kld")
def eval_kld(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: a folder, an adapter, or a .gguf file.")],
    other: Annotated[str, typer.Argument(metavar="QUANT", help="What is measured against it, likewise.")],
    data: Annotated[str, typer.Option(help="Texts or conversations that neither was calibrated on.")],
    tokens: Annotated[int, typer.Option(min=2, help="How many to compare on.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Longest sequence in tokens.")] = 512,
    precision: EvalPrecision = "16bit",
    tokenizer: EvalTokenizer = None,
    batch_size: EvalBatch = 1,
    output: EvalOutput = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say how far a model is from its original: KL divergence, changed answers, size."""
    from unsloth.cli import evaluate as command

    options = command.EvalOptions(precision, batch_size, tokenizer, output, trust_remote_code)
    command.divergence(base, other, data, tokens=tokens, context=context, options=options)


@evaluation.command("mmlu")
def eval_mmlu(
    model: Scored,
    data: Annotated[str, typer.Option(help="Questions: columns question, choices (or A to D), answer, subject.")],
    examples: Annotated[
        str | None, typer.Option(help="Answered ones to show; default: the first of each subject.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples shown before each question.")] = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many.")] = None,
    precision: EvalPrecision = "16bit",
    tokenizer: EvalTokenizer = None,
    batch_size: EvalBatch = 1,
    output: EvalOutput = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Ask multiple-choice questions, counting the letters with and without a space before them."""
    from unsloth.cli import evaluate as command

    options = command.EvalOptions(precision, batch_size, tokenizer, output, trust_remote_code)
    command.questions(model, data, examples=examples, shots=shots, limit=limit, options=options)


@evaluation.command("tasks")
def eval_tasks(
    model: Scored,
    names: Annotated[list[str], typer.Option("--task", help="A task or group of the harness; may be repeated.")],
    shots: Annotated[int | None, typer.Option(min=0, help="Examples; default: what the task says.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    include_path: Annotated[str | None, typer.Option(help="A folder with tasks of your own.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions through the chat template.")] = False,
    precision: EvalPrecision = "16bit",
    tokenizer: EvalTokenizer = None,
    batch_size: EvalBatch = 1,
    output: EvalOutput = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Run tasks of the lm-evaluation-harness, which the extra eval installs."""
    from unsloth.cli import evaluate as command

    options = command.EvalOptions(precision, batch_size, tokenizer, output, trust_remote_code)
    command.tasks(model, names, shots=shots, limit=limit, include_path=include_path, chat=chat, options=options)


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
