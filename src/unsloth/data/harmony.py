"""Conversations in the Harmony format of the gpt-oss models, as OpenAI's ``openai-harmony`` package writes it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.data.conversation import parse_messages

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
_EFFORTS = ("low", "medium", "high")
_INDENT = "    "


@dataclass(frozen=True)
class _Message:
    """One message as Harmony has it: an author, a recipient, a channel, a content type, and text."""

    author: str
    text: str
    channel: str = ""
    recipient: str = ""
    kind: str = ""

    def render(self, end: str) -> str:
        header = f"{self.author} to={self.recipient}" if self.recipient else self.author
        channel = f"<|channel|>{self.channel}" if self.channel else ""
        kind = f" {self.kind}" if self.kind else ""
        return f"<|start|>{header}{channel}{kind}<|message|>{self.text}{end}"


def render_harmony(
    messages: Sequence[Mapping[str, Any]],
    reasoning_effort: str = "medium",
    add_generation_prompt: bool = True,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    developer_instructions: str | None = None,
    model_identity: str = IDENTITY,
    date: str | None = None,
) -> str:
    """A conversation as text in the Harmony format.

    As in OpenAI's package, once the conversation ends with an answer, the thoughts before its first answer are left
    out.

    Args:
        messages: With ``role`` and ``content``, and optionally ``thinking``, ``tool_calls``, ``name``. A first system
            message is taken for developer instructions. What the assistant says right before a call of a tool is
            taken for a thought.
        reasoning_effort: ``"low"``, ``"medium"`` or ``"high"``.
        add_generation_prompt: End with the start of an answer; otherwise the last answer ends the text.
        tool_calls: The tools on offer, as JSON schemas.
        developer_instructions: Come first in the developer message.
        model_identity: The first sentence of the system message.
        date: ``"YYYY-MM-DD"``; None is today.

    Raises:
        ConfigError: No such effort.
        DataError: Messages that cannot be read.
    """
    if reasoning_effort not in _EFFORTS:
        raise ConfigError(f"reasoning_effort must be one of {', '.join(_EFFORTS)}", got=reasoning_effort)
    parsed = parse_messages(list(messages), 0)
    if parsed[0]["role"] in ("system", "developer"):
        instructions = [developer_instructions, parsed.pop(0)["content"]]
        developer_instructions = "\n\n".join(part for part in instructions if part)
    tools = [tool.get("function", tool) for tool in tool_calls or ()]
    today = date or f"{datetime.now():%Y-%m-%d}"
    system = f"{model_identity}\nKnowledge cutoff: 2024-06\nCurrent date: {today}\n\n"
    system += f"Reasoning: {reasoning_effort}\n\n"
    system += "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    if tools:
        system += "\nCalls to these tools must go to the commentary channel: 'functions'."
    written = [_Message("system", system)]
    sections = [f"# Instructions\n\n{developer_instructions}"] if developer_instructions else []
    if tools:
        sections.append(_tools(tools))
    if sections:
        written.append(_Message("developer", "\n\n".join(sections)))
    talk = _without_old_thoughts(_talk(parsed))
    text = "".join(message.render("<|call|>" if message.kind else "<|end|>") for message in (*written, *talk))
    if add_generation_prompt:
        return text + "<|start|>assistant"
    if talk and talk[-1].channel == "final":
        return text.removesuffix("<|end|>") + "<|return|>"
    return text


def encode_conversations_with_harmony(
    messages: Sequence[Mapping[str, Any]],
    reasoning_effort: str = "medium",
    add_generation_prompt: bool = True,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    developer_instructions: str | None = None,
    model_identity: str = IDENTITY,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[int]:
    """A conversation as token ids in the Harmony format; see :func:`render_harmony` for the arguments.

    Args:
        messages: The conversation.
        reasoning_effort: How much the model is to think.
        add_generation_prompt: End with the start of an answer.
        tool_calls: The tools on offer.
        developer_instructions: Come first in the developer message.
        model_identity: The first sentence of the system message.
        tokenizer: That of a gpt-oss model. Without it the vocabulary of the package ``openai-harmony`` is used.

    Raises:
        TokenizerError: Neither a tokenizer nor the package is there.
    """
    text = render_harmony(
        messages, reasoning_effort, add_generation_prompt, tool_calls, developer_instructions, model_identity
    )
    if tokenizer is not None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if importlib.util.find_spec("openai_harmony") is None:
        raise TokenizerError(
            "token ids need a vocabulary",
            do="Pass tokenizer=tokenizer of a gpt-oss model, or install the package openai-harmony.",
        )
    import openai_harmony

    encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    return encoding.encode(text, allowed_special="all")


def _talk(messages: list[dict[str, Any]]) -> list[_Message]:
    written: list[_Message] = []
    called = ""
    for position, message in enumerate(messages):
        following = messages[position + 1] if position + 1 < len(messages) else {}
        thought = message.get("thinking") or message.get("reasoning_content") or ""
        if message["role"] == "assistant":
            calls = message.get("tool_calls") or []
            before_call = bool(calls or (following.get("role") == "assistant" and following.get("tool_calls")))
            if before_call:
                thought = thought or message["content"]
            if thought:
                written.append(_Message("assistant", thought, "analysis"))
            for call in calls:
                function = call.get("function", call)
                called = function["name"]
                written.append(
                    _Message("assistant", _json(function["arguments"]), "commentary", f"functions.{called}", "json")
                )
            if not before_call:
                written.append(_Message("assistant", message["content"], "final"))
        elif message["role"] in ("tool", "function"):
            called = message.get("name") or called
            if not called:
                raise DataError(f"message {position}: a tool message needs a name, or a tool call before it")
            written.append(_Message(f"functions.{called}", _json(message["content"]), "commentary", "assistant"))
        elif message["role"] == "user":
            written.append(_Message("user", message["content"]))
        else:
            written.append(_Message("developer", f"# Instructions\n\n{message['content']}"))
    return written


def _without_old_thoughts(messages: list[_Message]) -> list[_Message]:
    spoken = [message for message in messages if message.author == "assistant"]
    if not spoken or spoken[-1].channel != "final":
        return messages
    first = next(i for i, message in enumerate(messages) if message.channel == "final")
    return [message for i, message in enumerate(messages) if i > first or message.channel != "analysis"]


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as declarations in TypeScript."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for tool in tools:
        lines += [f"// {line}" for line in (tool.get("description") or "").splitlines()]
        takes = "" if tool.get("parameters") is None else f"_: {_type(tool['parameters'], '')}"
        lines += [f"type {tool['name']} = ({takes}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _type(schema: Mapping[str, Any], indent: str) -> str:
    kind = schema.get("type")
    if "oneOf" in schema:
        return "".join(f"\n{indent} | {_option(option, indent)}" for option in schema["oneOf"])
    if isinstance(kind, list):
        return " | ".join("number" if name == "integer" else name for name in kind)
    if kind == "object":
        described = f"{indent}// {schema['description']}\n" if "description" in schema else ""
        return described + "{\n" + _members(schema, indent) + indent + "}"
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and schema.get("enum"):
        return " | ".join(f'"{value}"' for value in schema["enum"] if isinstance(value, str))
    return {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _members(schema: Mapping[str, Any], indent: str) -> str:
    text = ""
    for name, member in (schema.get("properties") or {}).items():
        options, says = member.get("oneOf"), member.get("description")
        text += "".join(f"{indent}{comment}\n" for comment in _comments(member, options, says))
        text += f"{indent}{name}" + ("" if name in (schema.get("required") or ()) else "?") + ":"
        if options:
            for number, option in enumerate(options):
                repeats = option.get("description") == says or (number == 0 and says is not None)
                text += f"\n{indent} | {_option(option, indent, says=not repeats, bare=True)}"
            text += f"\n{indent},\n"
        else:
            default = f" // default: {_default(member)}" if "default" in member else ""
            text += f" {_nullable(member, _type(member, indent + _INDENT))},{default}\n"
    return text


def _comments(member: Mapping[str, Any], options: Sequence[Any] | None, says: str | None) -> list[str]:
    """What stands above a member; of one with options the description comes after the examples."""
    title = [f"// {member['title']}", "//"] if "title" in member else []
    strings = [f'// - "{example}"' for example in member.get("examples") or () if isinstance(example, str)]
    examples = ["// Examples:", *strings] if member.get("examples") else []
    described = [] if says is None else [f"// {says}"]
    if not options:
        return [*title, *described, *examples]
    if options[0].get("description") == says:  # then it stands beside the first option
        described = []
    default = [f"// default: {_default(member)}"] if "default" in member else []
    return [*title, *examples, *described, *default]


def _option(option: Mapping[str, Any], indent: str, says: bool = True, bare: bool = False) -> str:
    comments = [option["description"]] if says and "description" in option else []
    if "default" in option:
        comments.append(f"default: {_default(option, bare)}")
    comment = f" // {' '.join(comments)}" if comments else ""
    return _nullable(option, _type(option, indent + "   ")) + comment


def _nullable(schema: Mapping[str, Any], text: str) -> str:
    return f"{text} | null" if schema.get("nullable") and "null" not in text else text


def _default(schema: Mapping[str, Any], bare: bool = True) -> str:
    """A default value; a string is quoted, but not escaped, and bare in an enumeration of strings."""
    value = schema["default"]
    if isinstance(value, str) and (bare or not schema.get("enum")):
        return value if schema.get("enum") else f'"{value}"'
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
