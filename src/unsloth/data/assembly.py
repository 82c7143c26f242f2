"""Token ids of a conversation put together from ids that are known beforehand and from the texts that differ.

Control tokens cut a text into stretches that a tokenizer encodes independently of each other: it looks for these tokens
first, and gives what is between them to the model one by one. So the stretches of a template that hold no message's
text need to be encoded once, and of the others it is known beforehand which part is trained. This holds for
byte-level BPE without a normalizer that looks beyond a stretch; for other tokenizers nothing is assembled. Every form
is compared with the rendering as a whole before it is used.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.data import masking
from unsloth.data.batch_tokenizer import BatchTokenizer
from unsloth.data.masking import IGNORED
from unsloth.data.outline import Condition, Outline, Slot
from unsloth.data.template_engine import Rendered

Spans = list[tuple[int, int]]
_PROBES = ("Xa{0}X", " b {0}", "\n{0}\n", "{0} 7's ü漢😀", "\u0301{0}\t", "...{0}\n\n  ")


@dataclass(frozen=True)
class Fixed:
    """Tokens that are the same in every row.

    Attributes:
        ids: Token ids.
        labels: Their labels.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Varying:
    """A stretch between two control tokens with the text of a message in it.

    Attributes:
        parts: What it is made of, and whether that is trained.
        lead: Token ids of the untrained text that it begins with, if all after that is trained.
        way: ``"none"`` or ``"all"`` of it is trained; what is ``"after"`` the lead; or which tokens are trained is
            to be ``"looked up"``.
    """

    parts: tuple[tuple[str | Slot, bool], ...]
    lead: list[int]
    way: str
    pattern: str | None = field(init=False, default=None)
    """The stretch in the language of ``str.format``, with numbers of messages; None if texts are to be stripped."""

    def __post_init__(self) -> None:
        if not any(isinstance(part, Slot) and part.strips for part, _ in self.parts):
            pattern = "".join(
                f"{{{part.message}}}" if isinstance(part, Slot) else part.replace("{", "{{").replace("}", "}}")
                for part, _ in self.parts
            )
            object.__setattr__(self, "pattern", pattern)

    def fill(self, texts: Sequence[str]) -> str:
        """The stretch in a row whose messages say ``texts``."""
        if self.pattern is not None:
            return self.pattern.format(*texts)
        return "".join([part if isinstance(part, str) else part.fill(texts) for part, _ in self.parts])

    def spans(self, texts: Sequence[str]) -> Spans:
        """The characters of it that are trained."""
        found, position = [], 0
        for part, trained in self.parts:
            end = position + len(part if isinstance(part, str) else part.fill(texts))
            if trained:
                found.append((position, end))
            position = end
        return found


@dataclass(frozen=True)
class Form:
    """How rows with one sequence of roles are put together.

    Attributes:
        stretches: What they consist of.
        outline: What is written.
        conditions: What must be true of the texts, beside the outline's conditions.
    """

    stretches: tuple[Fixed | Varying, ...]
    outline: Outline
    conditions: tuple[Condition, ...]

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether a row whose messages say ``texts`` has this form."""
        outline = self.outline
        if (outline.conditions or outline.clock) and not outline.holds(texts):
            return False
        return not self.conditions or all(condition.holds(texts) for condition in self.conditions)

    def texts(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        """What is to be encoded, and whether it is to be looked up which of its tokens are trained."""
        return [(s.fill(texts), s.way == "looked up") for s in self.stretches if isinstance(s, Varying)]

    def assembled(
        self, texts: Sequence[str], encodings: Iterable[Any], tokenizer: BatchTokenizer
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a row, from the encodings of its :meth:`texts`."""
        ids: list[int] = []
        labels: list[int] = []
        encodings = iter(encodings)
        for stretch in self.stretches:
            if isinstance(stretch, Fixed):
                ids += stretch.ids
                labels += stretch.labels
                continue
            encoding = next(encodings)
            found = encoding.ids
            ids += found
            if stretch.way == "none":
                labels += [IGNORED] * len(found)
            elif stretch.way == "all":
                labels += found
            elif stretch.way == "after" and found[: len(stretch.lead)] == stretch.lead:
                # Tokens of bytes: what has the lead's tokens has its text, and training begins at the next token.
                labels += [IGNORED] * len(stretch.lead)
                labels += found[len(stretch.lead) :]
            else:
                if stretch.way == "after":
                    encoding = tokenizer.encode([stretch.fill(texts)], begin=False, offsets=True)[0]
                labels += masking.label_encoding(found, encoding, stretch.spans(texts))
        return ids, labels


class Assembler:
    """Makes forms, for one tokenizer.

    Args:
        tokenizer: The tokenizer.
        batch_tokenizer: The same, to be called.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_tokenizer: BatchTokenizer) -> None:
        self._tokenizer = batch_tokenizer
        self._added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = sorted({*self._added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.is_possible = batch_tokenizer.is_direct and _cuts_at_added_tokens(tokenizer)
        """Whether this tokenizer's rows can be put together."""

    def has_added_tokens(self, texts: Iterable[str]) -> bool:
        """Whether the name of an added token, control token or not, stands in a text."""
        if self._pattern is None:
            return False
        find = self._pattern.search
        return any([find(text) for text in texts])

    def form(
        self, outline: Outline, messages: int, empty: Sequence[int], read: Any, headers: Sequence[str]
    ) -> Form | None:
        """The form of an outline's rows, or None if there is none.

        Args:
            outline: What is written.
            messages: How many messages the rows have.
            empty: Those of them without text.
            read: From a :class:`Rendered` and its texts to the trained character ranges; None if all is trained.
            headers: The beginnings of turns that ``read`` knows, which are not trained.
        """
        samples = [["" if i in empty else probe.format(i) for i in range(messages)] for probe in _PROBES]
        samples = [texts for texts in samples if outline.holds(texts)]
        if len(samples) < 2 or not self.is_possible:
            return None
        found = [_edges(outline, outline.rendered(texts), texts, read) for texts in samples]
        if found[0] is None or any(edges != found[0] for edges in found):
            return None
        stretches = self._stretches(_runs(outline, found[0]))
        if stretches is None:
            return None
        form = Form(tuple(stretches), outline, tuple(_undecided(outline, headers)) if read else ())
        if all(self._is_right(form, texts, read) for texts in samples if form.holds(texts)):
            return form
        return None

    def _is_right(self, form: Form, texts: Sequence[str], read: Any) -> bool:
        rendered = form.outline.rendered(texts)
        whole = self._tokenizer.encode([rendered.text], begin=False, offsets=True)[0]
        spans = read(rendered, texts) if read else [(0, len(rendered.text))]
        expected = list(whole.ids) if not read else masking.label_encoding(whole.ids, whole, spans)
        parts = [self._tokenizer.encode([text], False, looked_up)[0] for text, looked_up in form.texts(texts)]
        return form.assembled(texts, parts, self._tokenizer) == (whole.ids, expected)

    def _stretches(self, runs: list[tuple[str | Slot, bool]]) -> list[Fixed | Varying] | None:
        """Cut at added tokens; None if one may be half fixed text and half a message's, or its number is unknown."""
        made: list[Fixed | Varying] = []
        open_: list[tuple[str | Slot, bool]] = []
        for literal, before, after in _literals(runs):
            if isinstance(literal, Slot):
                open_.append((literal, before[0]))
                continue
            if self._may_straddle(literal, *after):
                return None
            position = 0
            for match in self._pattern.finditer(literal) if self._pattern else ():
                open_ += _flagged(literal, before, position, match.start())
                made += self._closed(open_)
                open_ = []
                if match[0] not in self._added:
                    return None
                number = self._added[match[0]]
                made.append(Fixed([number], [number if before[match.start()] else IGNORED]))
                position = match.end()
            open_ += _flagged(literal, before, position, len(literal))
        made += self._closed(open_)
        return _merged(made)

    def _closed(self, parts: list[tuple[str | Slot, bool]]) -> list[Fixed | Varying]:
        if not parts:
            return []
        if all(isinstance(part, str) for part, _ in parts):
            stretch = Varying(tuple(parts), [], "looked up")
            encoding = self._tokenizer.encode([stretch.fill([])], begin=False, offsets=True)[0]
            return [Fixed(encoding.ids, masking.label_encoding(encoding.ids, encoding, stretch.spans([])))]
        flags = [trained for _, trained in parts]
        if len(set(flags)) == 1:
            return [Varying(tuple(parts), [], "all" if flags[0] else "none")]
        lead = flags.index(True)
        if all(flags[lead:]) and all(isinstance(part, str) for part, _ in parts[:lead]):
            text = "".join(str(part) for part, _ in parts[:lead])
            return [Varying(tuple(parts), self._tokenizer.encode([text], False, False)[0].ids, "after")]
        return [Varying(tuple(parts), [], "looked up")]

    def _may_straddle(self, literal: str, follows_slot: bool, precedes_slot: bool) -> bool:
        """Whether a token could begin in a message's text and end in ``literal``, or the other way round."""
        for name in self._added:
            for cut in range(1, len(name)):
                if follows_slot and (literal.startswith(name[cut:]) or name[cut:].startswith(literal)):
                    return True
                if precedes_slot and (literal.endswith(name[:cut]) or name[:cut].endswith(literal)):
                    return True
        return False


def _cuts_at_added_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    rust = tokenizer.backend_tokenizer
    normalizer = _kinds(rust.normalizer)
    splits = _kinds(rust.pre_tokenizer)
    if type(rust.model).__name__ != "BPE" or rust.model.dropout or tokenizer.split_special_tokens:
        return False
    if not {kind for kind, _ in normalizer} <= {"NFC"} or not splits:
        return False
    if not {kind for kind, _ in splits} <= {"ByteLevel", "Split", "Digits"}:
        return False
    if splits[-1][0] != "ByteLevel" or any(options.get("add_prefix_space") for _, options in splits):
        return False
    return not any(
        token.lstrip or token.rstrip or token.single_word or token.normalized
        for token in tokenizer.added_tokens_decoder.values()
    )


def _kinds(part: Any) -> list[tuple[str, dict[str, Any]]]:
    """The kinds of a part of a Rust tokenizer, of which it may have several in a row, and their options."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    members = state.get("pretokenizers", state.get("normalizers", [state]))
    return [(member["type"], member) for member in members]


def _edges(outline: Outline, rendered: Rendered, texts: Sequence[str], read: Any) -> list[tuple[int, int]] | None:
    """Where training begins and ends, in turn, as piece and place within it; None if within a message's text."""
    starts = [0]
    for part in outline.pieces:
        starts.append(starts[-1] + len(part if isinstance(part, str) else part.fill(texts)))
    edges = []
    for character in [edge for span in read(rendered, texts) for edge in span] if read else [0, starts[-1]]:
        piece = min(bisect_right(starts, character) - 1, len(outline.pieces))
        place = character - starts[piece]
        if place and isinstance(outline.pieces[piece], Slot):
            return None
        edges.append((piece, place))
    return edges


def _runs(outline: Outline, edges: list[tuple[int, int]]) -> list[tuple[str | Slot, bool]]:
    """The pieces, cut where training begins and ends, and whether each is trained."""
    runs: list[tuple[str | Slot, bool]] = []
    trained, remaining = False, list(edges)
    for number, piece in enumerate(outline.pieces):
        position = 0
        while remaining and remaining[0][0] <= number:
            place = remaining.pop(0)[1]
            if isinstance(piece, str):
                runs.append((piece[position:place], trained))
                position = place
            trained = not trained
        runs.append((piece[position:] if isinstance(piece, str) else piece, trained))
    return [(part, flag) for part, flag in runs if part != ""]


def _literals(
    runs: list[tuple[str | Slot, bool]],
) -> Iterator[tuple[str | Slot, list[bool], tuple[bool, bool]]]:
    """Slots, and between them all fixed text at once: with the flag of each character, and whether slots are beside."""
    flags: list[bool] = []
    text, follows = "", False
    for part, trained in runs:
        if isinstance(part, str):
            text += part
            flags += [trained] * len(part)
            continue
        if text:
            yield text, flags, (follows, True)
        yield part, [trained], (False, False)
        text, flags, follows = "", [], True
    if text:
        yield text, flags, (follows, False)


def _flagged(text: str, flags: list[bool], start: int, end: int) -> list[tuple[str | Slot, bool]]:
    """``text[start:end]``, cut where its flags change."""
    cuts = [i for i in range(start, end) if i == start or flags[i] != flags[i - 1]]
    return [(text[a:b], flags[a]) for a, b in zip(cuts, [*cuts, end][1:], strict=True)]


def _merged(stretches: list[Fixed | Varying]) -> list[Fixed | Varying]:
    merged: list[Fixed | Varying] = []
    for stretch in stretches:
        last = merged[-1] if merged else None
        if isinstance(stretch, Fixed) and isinstance(last, Fixed):
            merged[-1] = Fixed(last.ids + stretch.ids, last.labels + stretch.labels)
        else:
            merged.append(stretch)
    return merged


def _undecided(outline: Outline, headers: Sequence[str]) -> Iterator[Condition]:
    """Conditions under which no message's text decides where turns are and which of ``headers`` they begin with."""
    for part in outline.pieces:
        if isinstance(part, Slot) and part.strips:
            yield Condition(part, "vanishes")
    for piece, number in outline.marks:
        if number < 0:
            continue
        literal = ""
        for part in outline.pieces[piece:]:
            if isinstance(part, Slot):
                for header in headers:
                    if header.startswith(literal) and header != literal:
                        yield Condition(part, "startswith", header[len(literal)])
                break
            literal += part
