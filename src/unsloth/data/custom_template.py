"""Chat templates from an example: text with {INPUT} and {OUTPUT}, for training in Jinja and for Ollama."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.data import formats, ollama, tables
from unsloth.data.render import ChatRenderer

DEFAULT_SYSTEM_MESSAGE = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
)
_EXAMPLE = f"{DEFAULT_SYSTEM_MESSAGE}" + "\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}" * 2

logger = get_logger(__name__)


class CustomTemplate(NamedTuple):
    """What :func:`construct_chat_template` makes.

    Attributes:
        modelfile: For Ollama; ``{__FILE_LOCATION__}`` stands for the path of the GGUF file.
        jinja_template: For the tokenizer.
        input_part: The text that starts a user's turn.
        output_part: The text that starts an assistant's turn.
    """

    modelfile: str
    jinja_template: str
    input_part: str
    output_part: str


class _Parts(NamedTuple):
    system: str
    before_input: str
    before_output: str
    after_output: str


def construct_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = _EXAMPLE,
    default_system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> CustomTemplate:
    """Make a chat template from an example of two turns.

    Args:
        tokenizer: The tokenizer; its end-of-text token ends an answer, unless the example ends answers itself with
            a token of the vocabulary.
        chat_template: The example: ``{INPUT}`` and ``{OUTPUT}`` twice each, and ``{SYSTEM}`` at most once before
            them.
        default_system_message: What ``{SYSTEM}`` becomes in conversations without a system message.
        extra_eos_tokens: More texts at which Ollama stops.

    Raises:
        ConfigError: The example lacks a field, or its two turns differ.
    """
    parts = _split(chat_template)
    ending = _ending(tokenizer, parts)
    jinja = _jinja(tokenizer, parts, ending, default_system_message or "")
    modelfile = ollama.modelfile(tokenizer, jinja, extra_stops=extra_eos_tokens or ())
    return CustomTemplate(modelfile, jinja, parts.before_input, parts.before_output)


def apply_chat_template(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    default_system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Render the conversations of a data set into its column ``text``.

    Args:
        dataset: A data set or a list of mappings, with conversations in any spelling.
        tokenizer: Gets the template made of ``chat_template``, and the Ollama file that goes with it as
            ``_ollama_modelfile``.
        chat_template: An example as in :func:`construct_chat_template`; None keeps the tokenizer's own template.
        default_system_message: As there.
        extra_eos_tokens: As there.

    Returns:
        The data set with a column ``text``.

    Raises:
        ConfigError: The example cannot be used.
        DataError: A row that cannot be rendered; names it.
        TokenizerError: There is no template.
    """
    if chat_template is not None:
        made = construct_chat_template(tokenizer, chat_template, default_system_message, extra_eos_tokens)
        tokenizer.chat_template = made.jinja_template
        tokenizer._ollama_modelfile = made.modelfile
    if not isinstance(dataset, IterableDataset):
        dataset = tables.as_dataset(dataset)
    renderer = ChatRenderer(tokenizer)

    def render(row: Mapping[str, Any], number: int) -> dict[str, str]:
        return {"text": renderer.render(formats.conversation_of(row, number), number).text}

    return dataset.map(render, with_indices=True)


def _split(example: str) -> _Parts:
    """The parts of an example: what comes before each field, and what ends an answer."""
    fields = re.findall(r"\{(SYSTEM|INPUT|OUTPUT)\}", example)
    turns = [name for name in fields if name != "SYSTEM"]
    if turns not in (["INPUT", "OUTPUT"], ["INPUT", "OUTPUT"] * 2) or fields.count("SYSTEM") > 1:
        raise ConfigError(
            "chat_template must show two turns, with {INPUT} and {OUTPUT} in each, and at most one {SYSTEM}",
            got=fields,
            do="Repeat the part from the user's header to the end of the answer.",
        )
    if "SYSTEM" in fields and fields[0] != "SYSTEM":
        raise ConfigError("{SYSTEM} must come before the first {INPUT}")
    head, *rest = re.split(r"\{INPUT\}|\{OUTPUT\}", example)
    if len(turns) == 2:
        before_output, after = rest
        cut = max(head.rfind("{SYSTEM}") + len("{SYSTEM}"), head.rfind("\n\n")) if "SYSTEM" in fields else 0
        cut = cut or max(head.rfind("\n\n"), 0)
        return _Parts(head[:cut], head[cut:], before_output, after)
    before_output, gap, again, tail = rest
    after = os.path.commonprefix([gap, tail])
    before_input = gap[len(after) :]
    if again != before_output or not head.endswith(before_input):
        raise ConfigError(
            "the two turns of chat_template differ",
            got=[head, before_output, gap, again],
            do="Write the same text before both {INPUT}s, and before both {OUTPUT}s.",
        )
    return _Parts(head[: len(head) - len(before_input)], before_input, before_output, after)


def _ending(tokenizer: PreTrainedTokenizerBase, parts: _Parts) -> str:
    """The Jinja that ends an answer: the example's own token, else the end of text before what follows."""
    own = next((token for token in _control_tokens(tokenizer) if parts.after_output.startswith(token)), None)
    if own is not None:
        return _literal(parts.after_output)
    return f"eos_token + {_literal(parts.after_output)}" if parts.after_output else "eos_token"


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*tokenizer.all_special_tokens, *added]


def _jinja(tokenizer: PreTrainedTokenizerBase, parts: _Parts, ending: str, default: str) -> str:
    bos = tokenizer.bos_token
    system = parts.system
    begins = "{{- bos_token }}\n" if bos and (system + parts.before_input).startswith(bos) else ""
    before_input = parts.before_input
    if begins:
        assert bos is not None
        system, before_input = system.removeprefix(bos), before_input if system else before_input.removeprefix(bos)
    elif bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        begins = "{{- bos_token }}\n"
    if "{SYSTEM}" in system:
        before, after = system.split("{SYSTEM}")
        written = f"{_literal(before)} + system_message + {_literal(after)}"
        refusal = ""
    else:
        written = _literal(system)
        refusal = (
            "    {{- raise_exception('This template has no {SYSTEM}: remove the system messages, or add one.') }}\n"
        )
    return (
        f"{begins}{{%- set default_system_message = {_literal(default)} %}}\n"
        "{%- set turns = messages %}\n"
        "{%- set system_message = default_system_message %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set turns = messages[1:] %}\n"
        f"{refusal}"
        "{%- endif %}\n"
        f"{{{{- {written} }}}}\n"
        "{%- for message in turns %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        f"        {{{{- {_literal(before_input)} + message['content'] }}}}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        f"        {{{{- {_literal(parts.before_output)} + message['content'] + {ending} }}}}\n"
        "    {%- else %}\n"
        "        {{- raise_exception('This template has only the roles user and assistant after the start.') }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        f"    {{{{- {_literal(parts.before_output)} }}}}\n"
        "{%- endif %}\n"
    )


def _literal(text: str) -> str:
    """``text`` as a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
