"""`unsloth eval`: how far a model is from another one, multiple-choice questions, tasks of the harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.cli import screen
from unsloth.core.errors import ConfigError, StorageError
from unsloth.export import harness, kld, mmlu, predict
from unsloth.models import record
from unsloth.train.estimate import format_bytes


@dataclass(frozen=True)
class EvalOptions:
    """How models are loaded, and where results go.

    Attributes:
        precision: How to hold base weights: ``"4bit"``, ``"8bit"`` or ``"16bit"``.
        batch_size: Sequences computed at once.
        tokenizer: Folder or hub id of the tokenizer; None takes the model's own, which a GGUF file has not here.
        output: A JSON file for the results.
        trust_remote_code: Whether the model's repository may run code.
    """

    precision: str = "16bit"
    batch_size: int = 1
    tokenizer: str | None = None
    output: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("4bit", "8bit", "16bit"):
            raise ConfigError("unknown --precision", got=self.precision, do="Use 4bit, 8bit or 16bit.")


def divergence(base: str, other: str, data: str, *, tokens: int, context: int, options: EvalOptions) -> None:
    """Print how far ``other`` is from ``base`` on the texts of ``data``.

    Raises:
        UnslothError: A model or file cannot be read, or the two do not belong together.
    """
    first, tokenizer = _open(base, options)
    second, another = _open(other, options)
    tokenizer = _tokenizer(options, tokenizer or another)
    found = kld.divergence(first, second, kld.sequences_of(data, tokenizer, context=context, tokens=tokens))
    rows = {
        "tokens": f"{found.tokens:,}",
        "mean KL divergence": f"{found.mean:.5f} nats",
        "median": f"{found.median:.5f}",
        "99.9 %": f"{found.percentile_99_9:.5f}",
        "largest": f"{found.largest:.5f}",
        "another token first": f"{found.flips:.2%}",
        "perplexity": f"{found.base_perplexity:.3f} -> {found.perplexity:.3f}",
        "size": f"{format_bytes(found.base_bytes)} -> {format_bytes(found.nbytes)}",
    }
    screen.console().print(screen.facts(f"{other} against {base}", rows))
    _write(options.output, {"base": base, "model": other, "data": data, **asdict(found)})


def questions(
    model: str, data: str, *, examples: str | None, shots: int, limit: int | None, options: EvalOptions
) -> None:
    """Print the share of multiple-choice questions that a model answers right.

    Args:
        model: Folder, adapter's folder, hub id or GGUF file.
        data: The questions.
        examples: A file of answered ones to show; None holds out the first of each subject in ``data``.
        shots: How many are shown before each question.
        limit: Questions to ask; None asks all.
        options: See :class:`EvalOptions`.

    Raises:
        UnslothError: The model or a file cannot be read.
    """
    asked = mmlu.read(data)
    shown = mmlu.read(examples) if examples is not None else []
    if examples is None:
        shown, asked = _held_out(asked, shots)
    predictor, tokenizer = _open(model, options)
    found = mmlu.score(predictor, _tokenizer(options, tokenizer), asked[:limit], shown, shots)
    rows = {
        "questions": f"{found.questions:,}, after {shots} examples each",
        "right": f"{found.accuracy:.2%} (standard error {found.error:.2%})",
        "only letters after a space": f"{found.spaced:.2%}",
        "only letters without": f"{found.unspaced:.2%}",
    }
    screen.console().print(screen.facts(model, rows))
    if len(found.by_subject) > 1:
        subjects = [(subject, f"{accuracy:.1%}") for subject, accuracy in found.by_subject.items()]
        screen.console().print(screen.grid("", ("subject", "right"), subjects))
    _write(options.output, {"model": model, "data": data, "shots": shots, **asdict(found)})


def tasks(
    model: str,
    names: Sequence[str],
    *,
    shots: int | None,
    limit: int | None,
    include_path: str | None,
    chat: bool,
    options: EvalOptions,
) -> None:
    """Print a model's results in tasks of the lm-evaluation-harness.

    Raises:
        UnslothError: The harness is not installed, or the model cannot be read.
        ConfigError: There is no such task.
    """
    predictor, tokenizer = _open(model, options)
    found = harness.evaluate(
        predictor,
        _tokenizer(options, tokenizer),
        names,
        shots=shots,
        limit=limit,
        include_path=include_path,
        chat=chat,
    )
    rows = [
        (task, metric.partition(",")[0], f"{value:.4f}")
        for task, values in found.items()
        for metric, value in values.items()
    ]
    screen.console().print(screen.grid(model, ("task", "metric", "value"), rows))
    _write(options.output, {"model": model, "results": found})


def _open(name: str, options: EvalOptions) -> tuple[predict.Predictor, PreTrainedTokenizerBase | None]:
    precision: record.Precision = options.precision  # type: ignore[assignment]
    return predict.open_predictor(
        name, precision=precision, batch_size=options.batch_size, trust_remote_code=options.trust_remote_code
    )


def _tokenizer(options: EvalOptions, own: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if options.tokenizer is not None:
        return predict.load_tokenizer(options.tokenizer, options.trust_remote_code)
    if own is None:
        raise ConfigError(
            "a tokenizer is needed to read the texts", do="Name the folder of the original model: --tokenizer FOLDER."
        )
    return own


def _held_out(asked: Sequence[mmlu.Question], shots: int) -> tuple[list[mmlu.Question], list[mmlu.Question]]:
    """The first questions of each subject, to be shown, and the others, to be asked."""
    shown: list[mmlu.Question] = []
    rest: list[mmlu.Question] = []
    seen: dict[str, int] = {}
    for question in asked:
        seen[question.subject] = seen.get(question.subject, 0) + 1
        (shown if seen[question.subject] <= shots else rest).append(question)
    return shown, rest


def _write(output: str | None, results: Mapping[str, Any]) -> None:
    if output is None:
        return
    try:
        Path(output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {output} ({error.strerror})", do="Choose another file.") from error
