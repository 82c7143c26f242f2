"""`unsloth eval COMMAND`: its commands and their arguments; what they do is in :mod:`unsloth.cli.evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from unsloth.cli.arguments import RemoteCode

app = typer.Typer(help="Measure a model: against another one, or on questions.", no_args_is_help=True)

EvalPrecision = Annotated[str, typer.Option("--precision", help="How to hold base weights: 4bit, 8bit or 16bit.")]
EvalTokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Where the tokenizer is, if no model has one, as GGUF files.")
]
EvalBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences computed at once.")]
EvalOutput = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the results to a file.")]
Scored = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, an adapter's folder, a hub id, or a .gguf file.")
]


@app.command("kld")
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


@app.command("mmlu")
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


@app.command("tasks")
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
