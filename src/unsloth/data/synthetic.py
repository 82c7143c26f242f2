"""Training rows that a model writes: questions and answers on documents, and new rows after the user's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.core.errors import ConfigError, DataError
from unsloth.core.log import get_logger
from unsloth.data import quality

Generate = Callable[[list[str]], list[str]]
"""Prompts in, replies out, in order."""

_ASK = """Read the text and write {count} questions about it with their answers. Each question must be understandable \
without the text, and each answer must follow from it.
Reply with nothing but JSON: [{{"question": "...", "answer": "..."}}]

Text:
{text}"""
_RATE = """Rate how correct, clear and useful each pair of question and answer is, from 1 to 10, given the text.
Reply with nothing but JSON, one number for each pair in order: [7, 9]

Text:
{text}

Pairs:
{pairs}"""
_VARY = """Here are examples of rows of a data set, as JSON:
{rows}

Write {count} new rows of the same structure on other topics of the same kind. Do not repeat the examples.
Reply with nothing but a JSON list of rows."""
_INVENT = """Write {count} rows of a data set for this task: {task}
Each row is a JSON object with the keys {columns}, all of them text. Cover different cases, and do not repeat these \
that are there already:
{rows}
Reply with nothing but a JSON list of rows."""
_RESTRUCTURE = """Turn each of these {count} rows into a question of a user and the answer of an assistant, without \
adding anything that is not in the row:
{rows}
Reply with nothing but JSON, one pair for each row in order: [{{"question": "...", "answer": "..."}}]"""

_PATIENCE = 3  # replies without a new row before giving up
_BATCH = 16  # prompts that are given to the model at once

logger = get_logger(__name__)


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made.

    Attributes:
        pairs_per_chunk: Questions asked for on each piece of text.
        threshold: Pairs rated below this, from 1 to 10, are left out; None does not rate.
        batch: Prompts that are given to the model at once.
    """

    pairs_per_chunk: int = 5
    threshold: float | None = 7.0
    batch: int = 16

    def __post_init__(self) -> None:
        if self.pairs_per_chunk < 1 or self.batch < 1:
            raise ConfigError("pairs_per_chunk and batch must be at least 1", got=(self.pairs_per_chunk, self.batch))
        if self.threshold is not None and not 1 <= self.threshold <= 10:
            raise ConfigError("threshold must be from 1 to 10, or None", got=self.threshold)


@dataclass(frozen=True)
class PairReport:
    """What became of the pieces of text.

    Attributes:
        chunks: Pieces of text.
        unreadable: Replies without readable pairs, or without a rating for each.
        pairs: Pairs that the model wrote.
        rated_out: Those below the threshold.
        repeated: Those whose question was asked before.
    """

    chunks: int
    unreadable: int
    pairs: int
    rated_out: int
    repeated: int


def make_pairs(
    texts: Sequence[str], generate: Generate, progress: Path, options: PairOptions | None = None
) -> tuple[list[dict[str, Any]], PairReport]:
    """Let a model write, rate and sort out questions and answers on pieces of text.

    What is done for a piece is kept in ``progress``, so that an interrupted run goes on where it was.

    Args:
        texts: The pieces.
        generate: Calls the model.
        progress: A file of JSON lines, one a piece; made if it is not there.
        options: How pairs are made.

    Returns:
        Rows with ``messages``, and what was counted.

    Raises:
        DataError: The model gave another number of replies than prompts, or no pair is left.
    """
    options = options or PairOptions()
    done = dict(_done(progress))
    keys = [_key(text, options) for text in texts]
    open_texts = [(key, text) for key, text in dict(zip(keys, texts, strict=True)).items() if key not in done]
    for start in range(0, len(open_texts), options.batch):
        batch = open_texts[start : start + options.batch]
        results = _write_and_rate([text for _, text in batch], generate, options)
        entries = [(key, result) for (key, _), result in zip(batch, results, strict=True)]
        done.update(entries)
        _append(progress, entries)
    results = [done[key] for key in dict.fromkeys(keys)]
    good = [pair for result in results for pair in result["pairs"]]
    kept = [good[number] for number in quality.unique([{"q": pair["question"]} for pair in good])]
    report = PairReport(
        chunks=len(texts),
        unreadable=sum(result["unreadable"] for result in results),
        pairs=len(good) + sum(result["rated_out"] for result in results),
        rated_out=sum(result["rated_out"] for result in results),
        repeated=len(good) - len(kept),
    )
    if not kept:
        raise DataError(f"no pair is left: {report}", do="Lower the threshold, or use a larger model.")
    return [_row(pair) for pair in kept], report


def make_variations(
    rows: Sequence[Mapping[str, Any]],
    generate: Generate,
    count: int,
    per_prompt: int = 5,
    progress: Path | None = None,
) -> list[dict[str, Any]]:
    """Let a model write new rows after the user's own.

    Args:
        rows: The examples; five at a time are shown, in turn.
        generate: Calls the model.
        count: How many prompts' worth of rows are asked for, in rows.
        per_prompt: Rows that one prompt asks for.
        progress: A file that keeps the replies, so that an interrupted call goes on where it was.

    Returns:
        Rows with the columns of the examples, without repetitions; there may be fewer than asked for.

    Raises:
        DataError: No examples, or no readable reply.
    """
    if not rows:
        raise DataError("there are no rows to write new ones after")
    columns = set(rows[0])
    prompts = []
    for i in range(-(-count // per_prompt)):
        shown = [rows[(5 * i + j) % len(rows)] for j in range(min(5, len(rows)))]
        examples = "\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in shown)
        prompts.append(_VARY.format(rows=examples, count=per_prompt))
    written = []
    for reply in _KeptReplies(generate, progress).ask(prompts):
        found = _json_list(reply) or []
        written += [row for row in found if isinstance(row, dict) and set(row) == columns]
    if not written:
        raise DataError("no reply held rows of the same columns", got=sorted(columns), do="Use a larger model.")
    repeated = set(quality.leaks(rows, written))
    return [written[i] for i in quality.unique(written) if i not in repeated][:count]


def invent(
    task: str,
    columns: Sequence[str],
    generate: Generate,
    count: int,
    per_prompt: int = 5,
    progress: Path | None = None,
) -> list[dict[str, Any]]:
    """Let a model write rows from nothing but the description of a task.

    Args:
        task: What the rows are for, such as ``"product reviews, each positive, negative or neutral"``.
        columns: The columns of a row.
        generate: Calls the model.
        count: How many rows are wanted.
        per_prompt: Rows that one prompt asks for. Each prompt shows a few of the rows written so far.
        progress: A file that keeps the replies, so that an interrupted call goes on where it was.

    Returns:
        Rows without repetitions; fewer than wanted if three replies in a row bring nothing new.

    Raises:
        ConfigError: No columns, or fewer than one row wanted.
        DataError: No reply held rows of these columns.
    """
    if not columns or count < 1:
        raise ConfigError("rows need columns, and at least one must be wanted", got=(list(columns), count))
    written: list[dict[str, Any]] = []
    fruitless = 0
    replies = _KeptReplies(generate, progress)
    while len(written) < count and fruitless < _PATIENCE:
        shown = "\n".join(json.dumps(row, ensure_ascii=False) for row in written[-per_prompt:]) or "(none)"
        prompt = _INVENT.format(count=per_prompt, task=task, columns=", ".join(columns), rows=shown)
        found = _json_list(replies.ask([prompt])[0]) or []
        both = written + [row for row in found if isinstance(row, dict) and set(row) == set(columns)]
        kept = [both[number] for number in quality.unique(both)]
        fruitless = 0 if len(kept) > len(written) else fruitless + 1
        written = kept
    if not written:
        raise DataError("no reply held rows of these columns", got=list(columns), do="Use a larger model.")
    return written[:count]


def restructure(
    rows: Sequence[Mapping[str, Any]], generate: Generate, per_prompt: int = 5, progress: Path | None = None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Let a model turn rows of any shape into conversations of one question and one answer.

    Args:
        rows: The rows.
        generate: Calls the model.
        per_prompt: Rows that one prompt shows.
        progress: A file that keeps the replies, so that an interrupted call goes on where it was.

    Returns:
        Rows with ``messages``; and the numbers of the rows of which the model made none.

    Raises:
        DataError: No rows, or no readable reply.
    """
    if not rows:
        raise DataError("there are no rows to restructure")
    starts = range(0, len(rows), per_prompt)
    prompts = []
    for start in starts:
        shown = [json.dumps(row, ensure_ascii=False, default=str) for row in rows[start : start + per_prompt]]
        prompts.append(_RESTRUCTURE.format(rows="\n".join(shown), count=len(shown)))
    made: list[dict[str, Any]] = []
    failed: list[int] = []
    for start, reply in zip(starts, _KeptReplies(generate, progress).ask(prompts), strict=True):
        pairs = _pairs(reply)
        expected = min(per_prompt, len(rows) - start)
        if len(pairs) == expected:
            made += [_row(pair) for pair in pairs]
        else:  # it cannot be told which pair belongs to which row
            failed += range(start, start + expected)
    if not made:
        raise DataError("no reply held a pair for each row", do="Use a larger model, or a smaller per_prompt.")
    return made, failed


def _write_and_rate(texts: list[str], generate: Generate, options: PairOptions) -> list[dict[str, Any]]:
    replies = _replies(generate, [_ASK.format(count=options.pairs_per_chunk, text=text) for text in texts])
    pairs = [_pairs(reply) for reply in replies]
    if options.threshold is None:
        return [{"pairs": found, "rated_out": 0, "unreadable": int(not found)} for found in pairs]
    rated = [i for i, found in enumerate(pairs) if found]
    prompts = [_RATE.format(text=texts[i], pairs=json.dumps(pairs[i], ensure_ascii=False)) for i in rated]
    ratings = dict(zip(rated, _replies(generate, prompts), strict=True)) if rated else {}
    results = []
    for i, found in enumerate(pairs):
        scores = _json_list(ratings.get(i, "")) or []
        if len(scores) != len(found) or not all(isinstance(score, int | float) for score in scores) or not found:
            results.append({"pairs": [], "rated_out": 0, "unreadable": 1})
            continue
        good = [pair for pair, score in zip(found, scores, strict=True) if score >= options.threshold]
        results.append({"pairs": good, "rated_out": len(found) - len(good), "unreadable": 0})
    return results


class _KeptReplies:
    """Replies of a model, kept in a file as they come, and taken from there when the same is asked again.

    A prompt that one call asks twice may have two replies, so it is known by its text and by how often it was asked.
    """

    def __init__(self, generate: Generate, progress: Path | None) -> None:
        self._generate = generate
        self._progress = progress
        self._done = {key: entry["reply"] for key, entry in _done(progress)} if progress else {}
        self._asked: Counter[str] = Counter()

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply for each prompt, in order."""
        keys = []
        for prompt in prompts:
            keys.append(_digest(f"{self._asked[prompt]} {prompt}"))
            self._asked[prompt] += 1
        left = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if key not in self._done]
        for start in range(0, len(left), _BATCH):
            batch = left[start : start + _BATCH]
            replies = _replies(self._generate, [prompt for _, prompt in batch])
            self._keep([(key, {"reply": reply}) for (key, _), reply in zip(batch, replies, strict=True)])
        return [self._done[key] for key in keys]

    def _keep(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        self._done.update((key, entry["reply"]) for key, entry in entries)
        if self._progress is not None:
            _append(self._progress, entries)


def _append(progress: Path, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    progress.parent.mkdir(parents=True, exist_ok=True)
    with progress.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n" for key, entry in entries)
        file.flush()
        os.fsync(file.fileno())


def _replies(generate: Generate, prompts: list[str]) -> list[str]:
    replies = generate(prompts)
    if len(replies) != len(prompts):
        raise DataError(f"the model must give one reply for each of {len(prompts)} prompts", got=len(replies))
    return replies


def _pairs(reply: str) -> list[dict[str, str]]:
    """The pairs of a reply that are complete."""
    found = []
    for pair in _json_list(reply) or []:
        if isinstance(pair, dict):
            question, answer = pair.get("question"), pair.get("answer")
            if isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip():
                found.append({"question": question.strip(), "answer": answer.strip()})
    return found


def _json_list(reply: str) -> list[Any] | None:
    """The first list of a reply that is valid JSON; models like to write around it."""
    decoder = json.JSONDecoder()
    for start in (found.start() for found in re.finditer(r"\[", reply)):
        try:
            value, _ = decoder.raw_decode(reply, start)
        except json.JSONDecodeError:
            continue
        if isinstance(value, list):
            return value
    return None


def _done(progress: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an earlier run did; its last line may be cut off."""
    if not progress.is_file():
        return
    lines = progress.read_bytes().splitlines(keepends=True)  # of bytes: at line feeds, not at what Unicode breaks at
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            yield entry.pop("key"), entry
        except (ValueError, KeyError, AttributeError):
            if number < len(lines):
                raise DataError(f"{progress}, line {number}: no result of an earlier run", do="Remove it.") from None
            progress.write_bytes(b"".join(lines[:-1]))
            logger.info("%s: the last line was cut off; what it was about is done again", progress)


def _key(text: str, options: PairOptions) -> str:
    return _digest(f"{options.pairs_per_chunk} {options.threshold} {text}")


def _digest(about: str) -> str:
    return hashlib.blake2b(about.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _row(pair: Mapping[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": pair["question"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
    }
