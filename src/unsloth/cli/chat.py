"""`unsloth chat`: talk to a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging

from unsloth.api import FastLanguageModel
from unsloth.cli.options import precision_switch
from unsloth.core.errors import ConfigError
from unsloth.generate.prompts import check_text

_HELP = "/quit ends, /reset forgets the conversation, /system TEXT sets the system message."


@dataclass(frozen=True)
class ChatOptions:
    """How to talk.

    Attributes:
        model: Folder, adapter folder or hub id.
        prompt: Answer this message only.
        system: The system message.
        max_tokens: Longest answer in tokens.
        temperature: 0 always takes the most probable token; None leaves it to the model's own settings.
        precision: ``"4bit"``, ``"8bit"`` or ``"16bit"``; None means the library's default, 4 bits.
        trust_remote_code: Whether the model's repository may run code.
    """

    model: str
    prompt: str | None = None
    system: str | None = None
    max_tokens: int = 512
    temperature: float | None = None
    precision: str | None = None
    trust_remote_code: bool = False


@dataclass
class Conversation:
    """The messages so far; a model without a chat template just continues the last one."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, room: int) -> torch.Tensor:
        """Token ids, int64 [1, T] with T at most ``room``; the oldest exchanges are left out if they must be.

        Raises:
            ConfigError: The last message alone is too long.
        """
        for start in range(0, len(self.turns), 2):
            ids = self._encode(tokenizer, self.turns[start:])
            if ids.shape[1] <= room:
                return ids
        raise ConfigError(
            f"the message takes {ids.shape[1]:,} tokens, but there is room for {room:,}",
            do="Shorten it, or lower --max-tokens.",
        )

    def _encode(self, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> torch.Tensor:
        if not tokenizer.chat_template:
            return tokenizer(turns[-1]["content"], return_tensors="pt")["input_ids"]
        messages = [*([{"role": "system", "content": self.system}] if self.system else []), *turns]
        return torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True)])


class _Printer(TextStreamer):
    """Prints an answer as it comes, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next piece of text."""
        self.answer += text
        print(text, end="\n" if stream_end else "", flush=True)


def chat(options: ChatOptions) -> None:
    """Answer one prompt, or lines from the terminal or a pipe until they end.

    Raises:
        UnslothError: The model cannot be loaded, or a message is too long.
    """
    switch = precision_switch(options.precision)
    if not sys.stdout.isatty():
        transformers_logging.disable_progress_bar()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, **switch, trust_remote_code=options.trust_remote_code
    )
    FastLanguageModel.for_inference(model)
    conversation = Conversation(options.system)
    if options.prompt is not None:
        answer(model, tokenizer, conversation, options.prompt, options)
        return
    if sys.stdin.isatty():
        print(_HELP)
        if not tokenizer.chat_template:
            print("This model has no chat template: it continues each line as text.")
    for line in _lines():
        if line == "/quit":
            return
        if line.startswith("/"):
            print(_command(line, conversation))
        elif line:
            try:
                answer(model, tokenizer, conversation, line, options)
            except ConfigError as error:  # of this message; the next one may be better
                print(f"Error: {error}")


def _command(line: str, conversation: Conversation) -> str:
    """Carry out a line that starts with a slash; return what to say about it."""
    name, _, text = line.partition(" ")
    if name == "/reset":
        conversation.turns.clear()
        return "The conversation is forgotten."
    if name == "/system":
        conversation.system = text.strip() or None
        return "The system message is set." if conversation.system else "There is no system message now."
    return f"Unknown command {name}. {_HELP}"


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, message: str, options: ChatOptions
) -> str:
    """Print the model's answer as it is made, and add it to the conversation; Ctrl-C cuts it short.

    Raises:
        ConfigError: The message is too long, or not Unicode; it is not part of the conversation then.
    """
    conversation.turns.append({"role": "user", "content": check_text(message)})
    room = max(model.max_seq_length - options.max_tokens, 1)
    try:
        ids = conversation.tokens(tokenizer, room).to(model.device)
    except ConfigError:
        conversation.turns.pop()
        raise
    printer = _Printer(tokenizer)
    try:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=printer,
                max_new_tokens=options.max_tokens,
                **_sampling(options.temperature),
            )
    except KeyboardInterrupt:
        if options.prompt is not None:
            raise
        print("\n(interrupted)")
    conversation.turns.append({"role": "assistant", "content": printer.answer.strip()})
    return printer.answer


def _sampling(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def _lines() -> Iterator[str]:
    """Lines of the terminal, with a prompt, or of standard input, until they end."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
