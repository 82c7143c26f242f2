"""Calling what users bring: chat templates and formatting functions.

The one place of the data layer that may meet any exception; each is raised again with the row it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError, TokenizerError
from unsloth.data.conversation import Conversation
from unsloth.data.outline import Outline, Tracer
from unsloth.data.template_engine import CompiledTemplate, LimitError, Rendered, RenderLimits

FormattingFunction = Callable[[Mapping[str, Any]], str | list[str]]

_INVISIBLE = "\u200b"  # zero-width space: splits the name of a control token without changing how the text looks


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`TokenizerError` if the tokenizer cannot render conversations."""
    if not tokenizer.chat_template:
        raise TokenizerError(
            "the tokenizer has no chat template, which conversations need",
            got=tokenizer.name_or_path,
            do='Give it one, such as tokenizer = get_chat_template(tokenizer, "chatml"); '
            "list(CHAT_TEMPLATES) has all names.",
        )


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, sandboxed and limited.

    Args:
        tokenizer: With a chat template.
        limits: What one rendering may use.
        escape: Write the names of control tokens that occur within messages with an invisible character in them,
            so that they are tokenized as the text they are.
        template: Replaces the tokenizer's own.

    Raises:
        TokenizerError: There is no template, or it is no valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: RenderLimits | None = None,
        escape: bool = False,
        template: str | None = None,
    ) -> None:
        if template is None:
            require_template(tokenizer)
        self._given = template
        self.tokenizer = tokenizer
        self._limits = limits or RenderLimits()
        self._escape = escape
        names = sorted({*tokenizer.all_special_tokens, *_control_tokens(tokenizer)}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self._compiled: dict[str, CompiledTemplate] = {}
        self._tracers: dict[str, Tracer] = {}
        self._takes_parts: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Compiled templates are left behind: a worker process compiles its own."""
        return {**self.__dict__, "_compiled": {}, "_tracers": {}}

    def render(self, row: Conversation, number: int, add_generation_prompt: bool = False) -> Rendered:
        """Row ``number`` as the text that the chat template makes of it, and who wrote what.

        Raises:
            DataError: The template refused these messages.
            TokenizerError: The template did what templates may not do.
        """
        messages = self.escaped(row.messages) if self._escape else row.messages
        if any(not isinstance(message["content"], str) for message in messages):
            messages = self._with_parts(messages, number, row.tools is not None)
        variables = self._variables(row, add_generation_prompt)
        try:
            return self._template(row.tools is not None).render(messages, variables)
        except SecurityError as error:
            raise _forbidden(error, number) from error
        except Exception as error:
            raise _refused(error, row, number) from error

    def outline(self, row: Conversation) -> Outline | None:
        """What is written around the texts of ``row`` and of rows that differ in nothing else; None if unknown."""
        source = self._source(row.tools is not None)
        if source not in self._tracers:
            self._template(row.tools is not None)  # says what is wrong with a template
            self._tracers[source] = Tracer(source, self._limits)
        return self._tracers[source].trace(row.messages, self._variables(row, add_generation_prompt=False))

    def _variables(self, row: Conversation, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            **self.tokenizer.special_tokens_map,
            "tools": row.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **(row.variables or {}),
        }

    def _with_parts(self, messages: Sequence[Mapping[str, Any]], number: int, tools: bool) -> list[dict[str, Any]]:
        """Messages in parts as this template takes them: as they are, or as text if they are nothing else."""
        if self._takes_parts is None:
            self._takes_parts = self._reads_parts(tools)
        parts = sorted({part["type"] for m in messages if not isinstance(m["content"], str) for part in m["content"]})
        if self._takes_parts:
            return list(messages)  # type: ignore[arg-type]
        if parts != ["text"]:
            others = ", ".join(part for part in parts if part != "text")
            raise DataError(
                f"row {number}: the chat template of this text model cannot take parts of the type {others}",
                do="Use a vision model with FastVisionModel, or remove the row.",
            )
        return [{**message, "content": _text_of(message["content"])} for message in messages]

    def _reads_parts(self, tools: bool) -> bool:
        probe = [{"role": "user", "content": [{"type": "text", "text": "Xp1X"}]}]
        try:
            text = self._template(tools).render(probe, {**self.tokenizer.special_tokens_map, "tools": None}).text
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
            return False
        return "Xp1X" in text and "'type'" not in text

    def has_control_tokens(self, row: Conversation) -> bool:
        """Whether the name of a control token stands within a message's text."""
        pattern = self._control
        return pattern is not None and any(
            isinstance(message["content"], str) and pattern.search(message["content"]) for message in row.messages
        )

    def leaves_out(self, row: Conversation, text: str) -> bool:
        """Whether the template wrote ``text`` without a thought, a tool call or a tool that ``row`` has."""
        calls = [call for message in row.messages for call in message.get("tool_calls") or ()]
        said = [entry.get("function", entry).get("name") for entry in (*(row.tools or ()), *calls)]
        said += [message.get(key) for message in row.messages for key in ("thinking", "reasoning_content")]
        found = [value.strip() for value in said if isinstance(value, str)]
        return any((self._escaped(value) if self._escape else value) not in text for value in found)

    def escaped(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of ``messages`` whose text holds no control token."""
        return [{key: self._escaped(value) for key, value in message.items()} for message in messages]

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str) and self._control is not None:
            return self._control.sub(lambda found: f"{found[0][0]}{_INVISIBLE}{found[0][1:]}", value)
        if isinstance(value, list):
            return [self._escaped(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self._escaped(item) for key, item in value.items()}
        return value

    def _template(self, with_tools: bool) -> CompiledTemplate:
        source = self._source(with_tools)
        if source not in self._compiled:
            self._compiled[source] = _compile(source, self._limits)
        return self._compiled[source]

    def _source(self, with_tools: bool) -> str:
        source = self._given or self.tokenizer.chat_template
        if isinstance(source, dict):
            name = "tool_use" if with_tools and "tool_use" in source else "default"
            if name not in source:
                raise TokenizerError("none of the tokenizer's chat templates is the default", got=sorted(source))
            source = source[name]
        return str(source)


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _compile(source: str, limits: RenderLimits) -> CompiledTemplate:
    try:
        return CompiledTemplate(source, limits)
    except Exception as error:
        raise TokenizerError(
            f"the chat template is no valid Jinja: {error}", do="Set another with get_chat_template."
        ) from error


def _forbidden(error: SecurityError, number: int) -> TokenizerError:
    what = "took too much" if isinstance(error, LimitError) else "tried something that templates may not do"
    return TokenizerError(
        f"row {number}: the chat template {what}: {type(error).__name__}: {error}",
        do="Do not trust this template; set another with get_chat_template.",
    )


def _refused(error: Exception, row: Conversation, number: int) -> Exception:
    if isinstance(error, TokenizerError):
        return error
    roles = [message["role"] for message in row.messages]
    return DataError(
        f"row {number}: the chat template refused the conversation with the roles {roles}: {error}",
        do="Remove or repair the row, or set another template with get_chat_template.",
    )


def formatted(function: FormattingFunction, rows: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """The texts that a user's formatting function makes of ``rows``, one each.

    The function is called with one row and returns its text; or, if it returns a list for one row, it is taken to
    be written for a batch and called with a mapping from column to list of values; a list of one text for one row
    is understood too.

    Args:
        function: The user's function.
        rows: Rows of the data set.
        first: Number of the first row, for messages.

    Raises:
        DataError: The function failed, or returned something that is not one text a row.
    """
    texts = [_call(function, row, first + i) for i, row in enumerate(rows[:1])]
    if texts and isinstance(texts[0], list):
        columns = {key: [row[key] for row in rows] * (2 if len(rows) == 1 else 1) for key in rows[0]}
        texts = _call(function, columns, first)  # type: ignore[assignment]
        if isinstance(texts, list) and len(texts) == 1:  # written for one row after all, with its text in a list
            texts = [_only(_call(function, row, first + i)) for i, row in enumerate(rows)]
        texts = texts[: len(rows)]
    else:
        texts += [_call(function, row, first + i) for i, row in enumerate(rows[1:], start=1)]
    if not isinstance(texts, list) or len(texts) != len(rows):
        raise DataError(f"formatting_func must return one text for each of {len(rows)} rows", got=texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"row {first + i}: formatting_func must return non-empty text", got=text)
    return texts  # type: ignore[return-value]


def _only(texts: str | list[str]) -> str | list[str]:
    return texts[0] if isinstance(texts, list) and len(texts) == 1 else texts


def _call(function: FormattingFunction, argument: Mapping[str, Any], number: int) -> str | list[str]:
    try:
        return function(argument)
    except Exception as error:
        raise DataError(f"row {number}: formatting_func raised {type(error).__name__}: {error}") from error


def guarded(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows of a source that is read as it goes; an error while reading names the row it came at.

    Raises:
        DataError: Reading failed.
    """
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"reading the data set failed at row {number}: {type(error).__name__}: {error}",
                do="Repair the source; a run goes on from its last checkpoint with resume_from_checkpoint=True.",
            ) from error
        yield row
        number += 1
