"""From rows to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.data import formats, masking, render
from unsloth.data.assembly import Form
from unsloth.data.batch_tokenizer import BatchTokenizer
from unsloth.data.conversation import Conversation
from unsloth.data.formats import Detection, Layout
from unsloth.data.forms import Forms, Masking
from unsloth.data.masking import IGNORED, ResponseMarkers
from unsloth.data.turns import TurnReader, is_silent

TrainOn = Literal["all", "responses", "last_response"]
LongRows = Literal["truncate", "chunk", "drop", "error"]

# What happened to a row, as bits of one column.
TRUNCATED, CONTROL, DOUBLE_BOS, SILENT, DROPPED, UNWRITTEN = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become tokens.

    Attributes:
        max_length: Longest row in tokens. None keeps all.
        text_field: Column that holds text.
        formatting: A user's function that makes the text of a row.
        train_on: ``"all"`` tokens; the assistant's ``"responses"``; or only the ``"last_response"`` of each row.
        responses: The texts that start a user's and an assistant's turn, for rows that are rendered already or
            templates that do not show whose text is whose. Given, they imply ``train_on="responses"``.
        packing: Let several documents share a row of ``max_length`` tokens.
        padding_free: Mark rows so that a batch is collated without padding.
        append_eos: End each row of a text column with the end-of-text token.
        num_proc: Worker processes for a ``datasets.Dataset``; a list is prepared in this one.
        layout: Overrides the recognition of the rows' layout.
        long_rows: What becomes of a row above ``max_length``: ``"truncate"`` cuts its end off, ``"chunk"`` makes
            several rows of it, of which each begins with the last token of the one before, so that every token is
            trained once; ``"drop"`` leaves it out; ``"error"`` names it.
        escape_control_tokens: Tokenize names of control tokens that occur within messages as the text they are.
        pack_length: Tokens of a packed row, where it may be longer than a document; None is ``max_length``.
        cache: Keep the result on the disk, and find it there (:mod:`unsloth.data.token_cache`).
        outlines: Work out once for each sequence of roles what the template writes, where this gives the same tokens
            (:mod:`unsloth.data.outline`, :mod:`unsloth.data.assembly`). False renders each row.
    """

    max_length: int | None
    text_field: str = "text"
    formatting: render.FormattingFunction | None = None
    train_on: TrainOn = "all"
    responses: ResponseMarkers | None = None
    packing: bool = False
    padding_free: bool = False
    append_eos: bool = True
    num_proc: int | None = None
    layout: Layout | None = None
    long_rows: LongRows = "truncate"
    escape_control_tokens: bool = False
    pack_length: int | None = None
    cache: bool = False
    outlines: bool = True

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError("max_length must be at least 2 tokens", got=self.max_length)
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs a row length", got=None, do="Set max_length=...")
        if self.pack_length is not None and self.pack_length < (self.max_length or 2):
            raise ConfigError("pack_length must not be below max_length", got=self.pack_length)
        if self.layout is not None and self.layout not in get_args(Layout):
            raise ConfigError(f"layout must be one of {', '.join(get_args(Layout))}", got=self.layout)
        for name, known in (("train_on", TrainOn), ("long_rows", LongRows)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}", got=getattr(self, name))
        if self.responses is not None and self.train_on == "all":
            object.__setattr__(self, "train_on", "responses")


@dataclass(frozen=True)
class Piece:
    """The text of one row.

    Attributes:
        text: The text.
        trained: Character ranges to train; None trains all.
        begin: Whether the tokenizer adds its begin-of-text token.
        flags: What was noticed.
    """

    text: str
    trained: list[tuple[int, int]] | None
    begin: bool = False
    flags: int = 0


@dataclass(frozen=True)
class Filled:
    """A row whose tokens are put together.

    Attributes:
        form: How.
        texts: What its messages say.
        flags: What was noticed.
    """

    form: Form
    texts: list[str]
    flags: int = 0


class Work:
    """The rows of a batch on their way to token ids.

    Args:
        items: What is to be tokenized, row by row; finished rows have their ids, labels and flags instead.
        numbers: Which rows they are.
        tokenizer: Makes the ids.
    """

    def __init__(self, items: Sequence[Any], numbers: Sequence[int], tokenizer: BatchTokenizer) -> None:
        self.items = items
        self.numbers = numbers
        self.tokenizer = tokenizer
        # Texts by whether they get a beginning, and whether it will be asked where in them tokens come from.
        self._texts: dict[tuple[bool, bool], list[str]] = {(a, b): [] for a in (False, True) for b in (False, True)}
        self._ways: list[list[tuple[bool, bool]]] = []
        self._encodings: dict[tuple[bool, bool], list[Any]] = {}
        for item in items:
            self._ways.append(self._ask(item))

    def _ask(self, item: Any) -> list[tuple[bool, bool]]:
        if isinstance(item, Piece):
            ways = [(item.begin, item.trained is not None)]
            self._texts[ways[0]].append(item.text)
            return ways
        if not isinstance(item, Filled):
            return []
        ways = []
        for text, looked_up in item.form.texts(item.texts):
            ways.append((False, looked_up))
            self._texts[False, looked_up].append(text)
        return ways

    def tokenize(self) -> None:
        """Call the tokenizer; may be done in another thread, which then uses the other cores."""
        for (begin, offsets), texts in self._texts.items():
            self._encodings[begin, offsets] = self.tokenizer.encode(texts, begin, offsets)

    def encodings(self) -> Iterator[tuple[Any, list[Any]]]:
        """Each item with its encodings."""
        left = {way: iter(found) for way, found in self._encodings.items()}
        for item, ways in zip(self.items, self._ways, strict=True):
            yield item, [next(left[way]) for way in ways]


class RowEncoder(Protocol):
    """Makes columns of token ids of rows; what ``Dataset.map`` applies, so it is picklable."""

    @property
    def num_proc(self) -> int | None:
        """Worker processes for a ``datasets.Dataset``."""

    def __call__(self, columns: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """Encode a batch, given by columns, of the rows with these ``numbers``."""

    def encode(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Encode ``rows``, which have these ``numbers``."""


class Encoder:
    """Makes token ids and labels of rows; the function that ``Dataset.map`` applies. Picklable.

    Args:
        tokenizer: The tokenizer.
        detection: What the rows are.
        options: How they become tokens.

    Raises:
        TokenizerError: The tokenizer lacks what the rows need.
        DataError: Rows of token ids cannot be masked by turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, detection: Detection, options: PrepareOptions) -> None:
        self.tokenizer = tokenizer
        self.detection = detection
        self.options = options
        self.markers = options.responses
        self._eos = tokenizer.eos_token if options.append_eos else None
        self._bos = tokenizer.bos_token_id
        self._swallowing = frozenset(n for n, token in tokenizer.added_tokens_decoder.items() if token.rstrip)
        self._ends = tuple(
            t for t in tokenizer.all_special_tokens if t not in (tokenizer.pad_token, tokenizer.bos_token)
        )
        self._ends += (tokenizer.eos_token,) if tokenizer.eos_token else ()
        self.renderer: render.ChatRenderer | None = None
        self.reader: TurnReader | None = None
        if detection.layout in ("conversation", "alpaca") or (detection.layout == "completion" and self._has_template):
            self.renderer = render.ChatRenderer(tokenizer, escape=options.escape_control_tokens)
            self.reader = TurnReader.of(self.renderer)
        if options.train_on != "all":
            self._choose_mask()
        self.batch_tokenizer = BatchTokenizer(tokenizer)
        self.forms: Forms | None = None
        if self.renderer is not None and options.outlines:
            mask = Masking(self.reader, options.train_on != "all", options.train_on == "last_response")
            self.forms = Forms(tokenizer, self.batch_tokenizer, self.renderer, mask)
        if detection.layout == "completion" and not tokenizer.is_fast:
            raise TokenizerError("rows with a completion need a fast tokenizer", got=type(tokenizer).__name__)

    @property
    def num_proc(self) -> int | None:
        """Worker processes for a ``datasets.Dataset``."""
        return self.options.num_proc

    @property
    def _has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _choose_mask(self) -> None:
        """By structure where the template shows it and the markers, if given, are the template's own."""
        if self.detection.layout == "tokens":
            raise DataError(
                "training on responses only needs text or conversations, but the rows are token ids already",
                do=f"Give them a 'labels' column with {IGNORED} for tokens not to train.",
            )
        if not self.tokenizer.is_fast:
            raise TokenizerError("training on responses only needs a fast tokenizer", got=type(self.tokenizer).__name__)
        if self.reader is not None and self.markers is not None and self.markers != self._own_markers():
            self.reader = None
        if self.reader is None and self.markers is None:
            self.markers = masking.find_markers(self.tokenizer)

    def _own_markers(self) -> ResponseMarkers | None:
        try:
            return masking.find_markers(self.tokenizer)
        except TokenizerError:
            return None

    def __call__(self, columns: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """Encode a batch, given by columns, of the rows with these ``numbers``."""
        return self.encode(rows_of(columns, len(numbers)), numbers)

    def encode(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Encode ``rows``; returns the columns input_ids, labels, flags, and seq_lengths if padding-free."""
        work = self.begin(rows, numbers)
        work.tokenize()
        return self.finish(work)

    def begin(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Work:
        """The part of :meth:`encode` before the tokenizer is called."""
        items: Sequence[Any]
        if self.detection.layout == "tokens" and not self.options.formatting:
            items = [(*given_tokens(row, number), 0) for row, number in zip(rows, numbers, strict=True)]
        else:
            items = self.pieces(rows, numbers)
        return Work(items, numbers, self.batch_tokenizer)

    def finish(self, work: Work) -> dict[str, list[Any]]:
        """The part of :meth:`encode` after the tokenizer was called."""
        result: dict[str, list[Any]] = {"input_ids": [], "labels": [], "flags": []}
        for (item, encodings), number in zip(work.encodings(), work.numbers, strict=True):
            ids, labels, flags = item if isinstance(item, tuple) else self._labelled(item, encodings)
            for part_ids, part_labels, part_flags in self._fitted(ids, labels, flags, number):
                result["input_ids"].append(part_ids)
                result["labels"].append(part_labels)
                result["flags"].append(part_flags)
        if self.options.padding_free:
            result["seq_lengths"] = [[len(ids)] for ids in result["input_ids"]]
        return result

    def pieces(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Sequence[Piece | Filled]:
        """The texts of ``rows``, and what of them is trained."""
        if self.options.formatting:
            texts = render.formatted(self.options.formatting, rows, numbers[0])
            return [self._plain(text) for text in texts]
        if self.detection.layout == "text":
            field = self.options.text_field
            return [self._plain(formats.text_of(row, field, n)) for row, n in zip(rows, numbers, strict=True)]
        make = self._completion if self.detection.layout == "completion" else self._conversation
        return [make(row, number) for row, number in zip(rows, numbers, strict=True)]

    def _plain(self, text: str) -> Piece:
        # A rendered conversation brings its own end, the end of a turn.
        if self._eos and not text.rstrip().endswith(self._ends):
            text += self._eos
        bos = self.tokenizer.bos_token
        trained = masking.response_spans(text, self.markers) if self.markers is not None else None
        if trained and self.options.train_on == "last_response":
            trained = trained[-1:]
        return Piece(text, trained, begin=not (bos and text.startswith(bos)))

    def _conversation(self, row: Mapping[str, Any], number: int) -> Piece | Filled:
        formats.refuse_images(row, number)
        return self._rendered(formats.conversation_of(row, number, self.detection), number)

    def _rendered(self, conversation: Conversation, number: int, first: int = 0) -> Piece | Filled:
        assert self.renderer is not None
        flags = 0
        for message in conversation.messages:
            if not message["content"] and message["role"] == "assistant" and is_silent(message):
                flags = SILENT
        match = self.forms.find(conversation, first) if self.forms is not None else None
        if match is None:
            rendered = self.renderer.render(conversation, number)
        elif isinstance(match.known, Form):
            return Filled(match.known, match.texts, flags)
        else:
            rendered = match.known.rendered(match.texts)
        if match is None:  # else the row has nothing but texts, and no control token in them
            flags |= CONTROL * self.renderer.has_control_tokens(conversation)
            flags |= UNWRITTEN * self.renderer.leaves_out(conversation, rendered.text)
        trained = None
        last_only = self.options.train_on == "last_response"
        if self.options.train_on != "all" or first:
            if self.reader is not None:
                trained = self.reader.spans(rendered, conversation, number, first, last_only)
            elif self.markers is not None:
                trained = masking.response_spans(rendered.text, self.markers)[-1 if last_only else 0 :]
        return Piece(rendered.text, trained, flags=flags)

    def _completion(self, row: Mapping[str, Any], number: int) -> Piece | Filled:
        prompt, completion = formats.completion_of(row, number, self.detection)
        if isinstance(prompt, str):
            whole = self._plain(prompt + completion)
            return Piece(whole.text, [(len(prompt), len(whole.text))], whole.begin)
        if self.renderer is None:
            render.require_template(self.tokenizer)
        return self._rendered(Conversation(prompt + completion, formats.tools_of(row, number)), number, len(prompt))

    def _labelled(self, item: Piece | Filled, encodings: list[Any]) -> tuple[list[int], list[int], int]:
        if isinstance(item, Filled):
            ids, labels = item.form.assembled(item.texts, encodings, self.batch_tokenizer)
        else:
            encoding = encodings[0]
            ids = encoding.ids
            labels = list(ids)
            if item.trained is not None:
                labels = masking.label_encoding(ids, encoding, item.trained, self._swallowing)
        flags, bos = item.flags, self._bos
        if bos is not None and ids[:2] == [bos, bos]:
            ids, labels, flags = ids[1:], labels[1:], flags | DOUBLE_BOS
        return ids, labels, flags

    def _fitted(
        self, ids: list[int], labels: list[int], flags: int, number: int
    ) -> list[tuple[list[int], list[int], int]]:
        """One row, or the several that a long one becomes."""
        limit = self.options.max_length
        if limit is None or len(ids) <= limit:
            return [(ids, labels, flags)]
        if self.options.long_rows == "error":
            raise DataError(
                f"row {number} has {len(ids):,} tokens, more than the maximum of {limit:,}",
                do="Raise max_seq_length, shorten the row, or choose another long_rows.",
            )
        if self.options.long_rows == "drop":
            return [(ids[:1], [IGNORED], flags | DROPPED)]
        if self.options.long_rows == "truncate":
            return [(ids[:limit], labels[:limit], flags | TRUNCATED)]
        starts = range(0, len(ids) - 1, limit - 1)
        return [(ids[s : s + limit], labels[s : s + limit], flags if s == 0 else 0) for s in starts]


def rows_of(columns: Mapping[str, list[Any]], count: int) -> list[dict[str, Any]]:
    """The rows of a batch that is given by columns."""
    return [{key: values[i] for key, values in columns.items()} for i in range(count)]


def given_tokens(row: Mapping[str, Any], number: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row that brings its own; without labels, what attention sees is trained."""
    ids = list(row["input_ids"])
    labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
    if len(labels) != len(ids):
        raise DataError(f"row {number}: {len(ids)} input_ids but {len(labels)} labels")
    if row.get("labels") is None and row.get("attention_mask") is not None:
        labels = [label if seen else IGNORED for label, seen in zip(labels, row["attention_mask"], strict=True)]
    return ids, labels
