"""Completions of several turns: what the model wrote, what an environment answered, and which tokens are whose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from unsloth.core.errors import ConfigError

Message: TypeAlias = dict[str, Any]
End = Literal["answered", "over", "too long", "too many turns"]

_SENTINEL = "sentinel8f3a"  # what a template neither strips nor escapes


@dataclass
class Episode:
    """One completion as it grows.

    Attributes:
        prompt_ids: Token ids of the prompt.
        ids: Token ids of the completion: the model's turns, and what was put between them.
        mask: 1 for each of ``ids`` that the model wrote, 0 for the others.
        logprobs: Log-probability of each of ``ids`` at its sampling, 0.0 for those of the environment; None if the
            sampler gives none.
        messages: The turns as messages.
        finished: Whether the model ended its last turn itself, by an end token or a stop text.
        turns: How many of them are the model's.
        end: Why it ended: the model ``"answered"``, the environment was ``"over"``, or it was cut: by the length of
            completions (``"too long"``), or by their number of turns (``"too many turns"``).
    """

    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    logprobs: list[float] | None
    messages: list[Message]
    finished: bool = True
    turns: int = 1
    end: End | None = None

    @property
    def cut(self) -> bool:
        """Whether it ended neither by the model nor by the environment."""
        return self.end in ("too long", "too many turns")

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None, by_model: bool) -> None:
        """Append tokens."""
        self.ids += ids
        self.mask += [int(by_model)] * len(ids)
        if self.logprobs is not None:
            self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


@dataclass(frozen=True)
class Turns:
    """Turns that the model wrote, one for each of some prompts.

    Attributes:
        ids: Token ids.
        logprobs: Log-probability of each at its sampling; None if the sampler gives none.
        finished: Whether the model ended each itself.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None
    finished: list[bool]


@dataclass(frozen=True)
class Limits:
    """When a completion is cut.

    Attributes:
        tokens: Of a completion, the environment's included.
        sequence: Tokens of prompt and completion together.
        turns: Of the model; None for no limit but the tokens.
        ends: Ids of the tokens that end a turn of the model.
    """

    tokens: int
    sequence: int
    turns: int | None
    ends: frozenset[int] = field(default_factory=frozenset)

    def room(self, episode: Episode) -> int:
        """Tokens that a completion may still have."""
        return min(self.tokens - len(episode.ids), self.sequence - len(episode.prompt_ids) - len(episode.ids))


def play(
    episodes: Sequence[Episode],
    limits: Limits,
    reply: Callable[[list[int]], list[Sequence[Message] | End]],
    between: Callable[[int, Sequence[Message], bool], list[int]],
    sample: Callable[[list[list[int]], list[int]], Turns],
    read: Callable[[int, list[int]], Message],
) -> None:
    """Go on with completions, all that are not over in one batch for each turn, until every one has an ``end``.

    A turn that was cut off for want of room is not answered.

    Args:
        episodes: With the model's first turn; changed in place.
        limits: When they are cut.
        reply: Numbers of episodes → for each, the messages that answer its last turn, or why it ends there.
        between: ``(number, messages, turn was ended)`` → token ids from the model's turn to the start of the next.
        sample: ``(prompts, most tokens of each turn)`` → the next turns.
        read: ``(number, token ids of a turn)`` → the message.
    """
    active = list(range(len(episodes)))
    while active:
        for number in active:
            if not episodes[number].finished and limits.room(episodes[number]) <= 0:
                episodes[number].end = "too long"
        active = [number for number in active if episodes[number].end is None]
        for number, replies in zip(active, reply(active), strict=True):
            episode = episodes[number]
            if isinstance(replies, str):
                episode.end = replies
            elif limits.turns is not None and episode.turns >= limits.turns:
                episode.end = "too many turns"
            else:
                ids = between(number, replies, bool(episode.ids) and episode.ids[-1] in limits.ends)
                if len(ids) >= limits.room(episode):
                    episode.end = "too long"
                    continue
                episode.messages += replies
                episode.add(ids, None, by_model=False)
        active = [number for number in active if episodes[number].end is None]
        if active:
            _next_turns(episodes, active, limits, sample, read)


def _next_turns(episodes: Sequence[Episode], active: list[int], limits: Limits, sample: Any, read: Any) -> None:
    """Let the model write a turn of every active episode."""
    most = [limits.room(episodes[number]) for number in active]
    prompts = [episodes[number].prompt_ids + episodes[number].ids for number in active]
    turns = sample(prompts, most)
    for place, number in enumerate(active):
        episode = episodes[number]
        room = limits.room(episode)
        ids = turns.ids[place][:room]
        episode.add(ids, None if turns.logprobs is None else turns.logprobs[place][:room], by_model=True)
        episode.finished = turns.finished[place] and len(turns.ids[place]) <= room
        episode.turns += 1
        episode.messages.append(read(number, ids))


def text_between(render: Callable[[list[Message]], str], messages: Sequence[Message], ends: Sequence[str]) -> str:
    """What a chat template writes from the end of a turn of the model up to the start of the next one.

    Args:
        render: Messages → text, with the beginning of the model's next turn.
        messages: The answer of the environment: of role ``tool``, or of another one.
        ends: Texts of the tokens that may end a turn.

    Returns:
        The text, beginning with the end token of the model's turn if the template writes one.

    Raises:
        ConfigError: The template does not show the conversation as it is.
    """
    turn: Message = {"role": "assistant", "content": _SENTINEL}
    if messages[0]["role"] == "tool":  # some templates take the name from the call
        call = {"name": messages[0]["name"], "arguments": {"value": _SENTINEL}}
        turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    text = render([{"role": "user", "content": "Begin."}, turn, *messages])
    before, found, after = text.rpartition(_SENTINEL)
    if not found or any(str(message["content"]).strip() not in after for message in messages):
        raise ConfigError(
            "the chat template does not show what an environment answers",
            got=text,
            do="Choose a template that does (get_chat_template).",
        )
    starts = [place for place in (after.find(end) for end in ends) if place >= 0]
    return after[min(starts) :] if starts else after
