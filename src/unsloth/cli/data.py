"""`unsloth data`: look at data sets, split, clean and mix them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unsloth.chat_templates import get_chat_template
from unsloth.cli import screen
from unsloth.core import artifact
from unsloth.core.errors import ConfigError
from unsloth.data import formats, mixture, quality, row_types, sources
from unsloth.data.encode import PrepareOptions
from unsloth.data.formats import Detection
from unsloth.data.preview import Preview, preview
from unsloth.models import embedded, source, tokenizer

_SHOWN_CHARACTERS = 4000  # of a row
_FOR_SFT = ("tokens", "text", "conversation", "alpaca", "completion")


@dataclass(frozen=True)
class ShowOptions:
    """What to show of a data set.

    Attributes:
        source: A file, a folder or a hub id.
        model: Whose tokenizer and template; None is the embedded model.
        template: Name of a chat template instead of the model's.
        rows: How many rows to print.
        responses_only: As if only the assistant's turns were trained.
        max_length: Count rows that are longer, in tokens.
        layout: What the rows are; None recognizes it.
        split: Split of a hub data set or saved folder.
    """

    source: str
    model: str | None = None
    template: str | None = None
    rows: int = 3
    responses_only: bool = False
    max_length: int | None = None
    layout: str | None = None
    split: str = "train"


def show(options: ShowOptions, console: Console | None = None) -> None:
    """Print rows as they are trained, and statistics.

    Raises:
        DataError: The data cannot be read, or a row cannot be used; names it.
        ConfigError: An unknown layout or template.
    """
    console = console or screen.console()
    rows = sources.load_rows(options.source, split=options.split)
    how = PrepareOptions(
        max_length=None,
        train_on="responses" if options.responses_only else "all",
        layout=options.layout,  # type: ignore[arg-type] # checked there
    )
    detection = formats.detect(list(rows[0]), how.text_field, how.layout)
    if detection.layout not in _FOR_SFT:
        _show_others(console, rows, detection, options.rows)
        return
    tokens = _tokenizer(options.model, options.template)
    for row in preview(rows, tokens, how, min(options.rows, len(rows))):
        console.print(_painted(console, row), "", soft_wrap=True)
    limited = PrepareOptions(max_length=options.max_length, train_on=how.train_on, layout=how.layout)
    console.print(screen.facts("The data set", _facts(quality.statistics(rows, tokens, limited), detection, options)))


def split(name: str, out: str, *, heldout: float, seed: int) -> None:
    """Write the two halves of a split."""
    train, held = quality.split(sources.load_rows(name), heldout=heldout, random_state=seed)
    _write(out, {"train.jsonl": train, "heldout.jsonl": held})
    screen.console().print(f"{len(train):,} rows to train on and {len(held):,} held out are in {out}", markup=False)


def deduplicate(name: str, out: str) -> None:
    """Write the rows that repeat no earlier one."""
    rows = sources.load_rows(name)
    kept = quality.unique(rows)  # type: ignore[arg-type]
    _write(out, {"rows.jsonl": (rows[number] for number in kept)})  # type: ignore[index]
    screen.console().print(f"{len(kept):,} of {len(rows):,} rows are in {out}", markup=False)  # type: ignore[arg-type]


def mix(files: Sequence[str], out: str, *, seed: int) -> None:
    """Write a mixture of data sets, each given as ``FILE=WEIGHT``.

    Raises:
        ConfigError: A weight is missing or no number.
    """
    parts, weights = [], []
    for item in files:
        name, equals, weight = item.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError("each data set needs a weight", got=item, do="Such as chat.jsonl=25.")
        parts.append(sources.load_rows(name))
    mixed = mixture.mix(parts, weights, random_state=seed)
    _write(out, {"rows.jsonl": mixed})
    counts = ", ".join(
        f"{count:,} of {item.rpartition('=')[0]}" for count, item in zip(mixed.counts(), files, strict=True)
    )
    screen.console().print(f"{len(mixed):,} rows are in {out}: {counts}", markup=False)


def _write(out: str, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    with artifact.stage(out, kind="data") as staging:
        for name, rows in files.items():
            with (staging / name).open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _tokenizer(model: str | None, template: str | None) -> PreTrainedTokenizerBase:
    found = source.resolve(model or embedded.SMOLLM2)
    location = found.location
    if found.adapter_base is not None:
        location = tokenizer.folder_for(location, source.resolve(found.adapter_base).location)
    loaded = tokenizer.load(location, max_seq_length=1 << 20)
    return loaded if template is None else get_chat_template(loaded, template)


def _painted(console: Console, row: Preview) -> Text:
    """A row, trained tokens green and the others dim; between brackets where there are no colors."""
    colors = screen.shows_colors(console)
    text = Text().append(f"Row {row.number}, {row.tokens:,} tokens, {row.trained_tokens:,} of them trained\n", "bold")
    left = _SHOWN_CHARACTERS
    for span in row.spans:
        shown = screen.visible(span.text[:left])
        if span.trained and not colors:
            shown = f"[[{shown}]]"
        text.append(shown, ("green" if span.trained else "dim") if colors else "")
        left -= len(span.text)
        if left <= 0:
            text.append("\n... and more")
            break
    return text


def _facts(found: quality.Statistics, detection: Detection, options: ShowOptions) -> dict[str, object]:
    share = found.trained_tokens / max(found.tokens, 1)
    longer = {}
    if options.max_length is not None:
        longer["truncated"] = f"{found.longer:,} rows are longer than {options.max_length:,} tokens"
    return {
        "layout": f"{detection.layout}, because of {detection.reason}",
        "rows": f"{found.rows:,}",
        "duplicates": f"{found.duplicates:,} rows repeat an earlier one",
        "tokens": f"{found.tokens:,}, {share:.0%} of them trained",
        "lengths": f"{found.shortest:,} to {found.longest:,} tokens, half of the rows up to {found.median:,}",
        **longer,
        "max_seq_length": f"{found.suggested_max_length:,} would hold 99% of the rows",
    }


def _show_others(console: Console, rows: Any, detection: Detection, count: int) -> None:
    """Rows that are for another trainer, by their messages."""
    for number in range(min(count, len(rows))):
        for name, conversation in row_types.conversations_of(rows[number], number, detection).items():
            console.print(Text(f"Row {number}, {name}", "bold"))
            for message in conversation.messages:
                said = message["content"] if isinstance(message["content"], str) else json.dumps(message["content"])
                console.print(Text(f"{message['role']}: ", "cyan").append(said[:_SHOWN_CHARACTERS], "default"))
        answer = row_types.answer_of(rows[number], detection)
        if answer is not None:
            console.print(Text("expected answer: ", "cyan").append(answer[:_SHOWN_CHARACTERS], "default"))
        console.print()
    facts = {
        "layout": f"{detection.layout}, because of {detection.reason}",
        "for": formats.TRAINERS[detection.layout],
        "rows": f"{len(rows):,}",
        "duplicates": f"{len(rows) - len(quality.unique(rows)):,} rows repeat an earlier one",
    }
    console.print(screen.facts("The data set", facts))
