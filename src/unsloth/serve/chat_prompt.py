"""From the messages of a request to token ids, through the model's chat template in its sandbox."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError
from unsloth.data.conversation import Conversation, parse_messages
from unsloth.data.render import ChatRenderer
from unsloth.generate.prompts import check_text
from unsloth.serve.requests import ChatRequest


class ChatPrompt:
    """Renders chats for one tokenizer.

    Args:
        tokenizer: With a chat template.

    Raises:
        TokenizerError: It has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)

    def tokens(self, request: ChatRequest) -> list[int]:
        """Token ids of a request's messages, up to where the answer begins.

        Raises:
            DataError: The messages are not as they must be, or the template refuses them.
            ConfigError: A text is not Unicode.
        TokenizerError: The template did what templates may not do.
        """
        given = [_read_calls(message.model_dump(exclude_none=True)) for message in request.messages]
        variables = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        row = Conversation(parse_messages(given, 0), request.offered_tools, variables)
        text = self._renderer.render(row, 0, add_generation_prompt=True).text
        return self._tokenizer(check_text(text), add_special_tokens=False)["input_ids"]


def _read_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as a mapping, which templates expect, not as JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_read_call(call) for call in calls]}


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("a tool call needs a function with a name", got=call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            raise DataError("the arguments of a tool call are no JSON", got=arguments) from None
    return {**call, "function": {**function, "arguments": arguments}}
