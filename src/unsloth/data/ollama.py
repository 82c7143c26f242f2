"""The Modelfile by which Ollama writes conversations exactly as they were trained."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError, TokenizerError
from unsloth.data.conversation import Conversation
from unsloth.data.render import ChatRenderer

FILE_LOCATION = "{__FILE_LOCATION__}"
"""Stands for the path of the GGUF file in a Modelfile."""

_SYSTEM, _TALK = "Xs1X", ("Xq1X", "Xa1X", "Xq2X", "Xa2X", "Xq3X")


@dataclass(frozen=True)
class Frames:
    """What a chat template writes around each message.

    Attributes:
        system: Before and after a system message.
        user: Before a user's message; what follows it up to the answer is in ``assistant``.
        assistant: Before and after an answer.
        system_in_user: The system message stands within the first user's turn.
        default_system: The system message of conversations that bring none.
    """

    system: tuple[str, str]
    user: str
    assistant: tuple[str, str]
    system_in_user: bool
    default_system: str


def frames(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> Frames:
    """Read the frames off a chat template by rendering known words.

    Args:
        tokenizer: With a chat template.
        chat_template: Replaces the tokenizer's own.

    Raises:
        TokenizerError: The template cannot be put into frames, because what it writes depends on more than roles.
    """
    renderer = ChatRenderer(tokenizer, template=chat_template)
    roles = ("user", "assistant") * 3
    talk = [{"role": role, "content": text} for role, text in zip(roles, _TALK, strict=False)]
    # The last answer may be written differently (with its thoughts), so the frames are those of earlier ones.
    plain = _gaps(renderer.render(Conversation(talk), 0).text, _TALK)
    ended = _gaps(renderer.render(Conversation(talk[:4]), 0).text, _TALK[:4])
    if plain is None or ended is None or plain[1] != plain[3]:
        raise _no_frames(tokenizer)
    bos = added_first(tokenizer)
    start, before_answer, between = plain[0].removeprefix(bos), plain[1], plain[2]
    after_answer = os.path.commonprefix([between, ended[4]])
    if after_answer.count("<") != after_answer.count(">") or (ended[4] and not after_answer):
        raise _no_frames(tokenizer)  # the last answer ends in a way of its own
    before_user = between[len(after_answer) :].removeprefix(bos)
    first = start.removesuffix(before_user)
    before_system, after_system, inside, default = "", "", False, first
    gaps = _with_system(renderer, talk)
    if gaps is not None:
        before_system, after_system = gaps[0].removeprefix(bos), gaps[1]
        inside = not after_system.endswith(before_user)
        if inside:
            before_system, default = before_system.removeprefix(before_user), ""
        else:
            after_system = after_system.removesuffix(before_user)
            default = first[len(before_system) : len(first) - len(after_system)]
    return Frames((before_system, after_system), before_user, (before_answer, after_answer), inside, default)


def added_first(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that is put before every text by itself, and so must not stand in the template; empty if none is."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else ""


def _no_frames(tokenizer: PreTrainedTokenizerBase) -> TokenizerError:
    return TokenizerError(
        "the chat template cannot be written as an Ollama template",
        got=tokenizer.name_or_path,
        do="Ollama's own template for this family is to be used.",
    )


def _with_system(renderer: ChatRenderer, talk: list[dict[str, str]]) -> list[str] | None:
    """What stands around the messages when there is a system message; None if the template takes none."""
    messages = [{"role": "system", "content": _SYSTEM}, *talk]
    try:
        return _gaps(renderer.render(Conversation(messages), 0).text, [message["content"] for message in messages])
    except DataError:
        return None


def template(found: Frames) -> str:
    """The frames as a template in Ollama's language, which it applies to each pair of prompt and response."""
    system = f"{{{{ if .System }}}}{found.system[0]}{{{{ .System }}}}{found.system[1]}{{{{ end }}}}"
    prompt = f"{found.user}{system if found.system_in_user else ''}{{{{ .Prompt }}}}"
    answer = f"{found.assistant[0]}{{{{ .Response }}}}{found.assistant[1]}"
    return f"{'' if found.system_in_user else system}{{{{ if .Prompt }}}}{prompt}{{{{ end }}}}{answer}"


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    file_location: str = FILE_LOCATION,
    extra_stops: Sequence[str] = (),
) -> str:
    """A Modelfile with the template and the stop words of ``tokenizer``.

    Args:
        tokenizer: With a chat template.
        chat_template: Replaces the tokenizer's own.
        file_location: Path of the GGUF file.
        extra_stops: More stop words.

    Raises:
        TokenizerError: The template cannot be put into frames.
    """
    found = frames(tokenizer, chat_template)
    names = {*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values())}
    parts = found.assistant[1] + found.user
    stops = [name for name in sorted(names, key=parts.find) if name in parts]
    if tokenizer.eos_token and tokenizer.eos_token not in stops:
        stops.insert(0, tokenizer.eos_token)
    header = found.user.strip()
    if header and not any(stop in header for stop in stops):
        stops.append(header)  # headers in plain text: stop before a user's turn is made up
    lines = [f"FROM {file_location}", f'TEMPLATE """{template(found)}"""']
    lines += [f'PARAMETER stop "{quoted(stop)}"' for stop in dict.fromkeys((*stops, *extra_stops))]
    if found.default_system:
        lines.append(f'SYSTEM """{found.default_system}"""')
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A text as it stands between quotation marks in a Modelfile."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _gaps(text: str, words: Sequence[str]) -> list[str] | None:
    """What stands before, between and after ``words``; None unless they are there once each, in this order."""
    pattern = re.compile("|".join(map(re.escape, words)))
    return pattern.split(text) if pattern.findall(text) == list(words) else None
