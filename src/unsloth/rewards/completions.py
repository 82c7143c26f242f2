"""The text of completions and prompts, and reward functions made from a score of one text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from unsloth.core.errors import RewardError

Reward: TypeAlias = Callable[..., list[float]]  # f(prompts, completions, **columns), one number a completion


def text_of(message: Any) -> str:
    """The text of a prompt or completion: itself if a string, else the content of the last message.

    Of a content in parts (text and images) the text parts are joined; a message without content is empty.

    Raises:
        RewardError: It is neither a string nor a list of messages.
    """
    if isinstance(message, str):
        return message
    if isinstance(message, Sequence) and message and isinstance(message[-1], Mapping):
        content = message[-1].get("content")
        if content is None or isinstance(content, str):
            return content or ""
        if isinstance(content, Sequence):
            return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    raise RewardError(
        "a completion is neither text nor a list of messages", got=message, do="Pass completions as the trainer does."
    )


def from_text(name: str, score: Callable[[str], float]) -> Reward:
    """A reward function that scores the text of each completion."""

    def reward(prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    return named(reward, name)


def from_column(name: str, column: str, score: Callable[[str, Any], float]) -> Reward:
    """A reward function that scores the text of each completion beside its row's value of a data set column.

    Raises:
        RewardError: When called: the data set has no such column.
    """

    def reward(prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float]:
        values = column_of(name, columns, column, len(completions))
        return [score(text_of(completion), value) for completion, value in zip(completions, values, strict=True)]

    return named(reward, name)


def column_of(name: str, columns: Mapping[str, Any], column: str, rows: int) -> Sequence[Any]:
    """The values of a column, one a completion.

    Raises:
        RewardError: There is no such column, or it has another length.
    """
    values = columns.get(column)
    if values is None:
        raise RewardError(
            f"reward {name!r} needs the column {column!r}", got=sorted(columns), do="Name the column of your data set."
        )
    if len(values) != rows:
        raise RewardError(f"column {column!r} has {len(values)} values for {rows} completions", do="Pass one each.")
    return values


def named(reward: Reward, name: str) -> Reward:
    """Give a function the name under which trainers log it."""
    reward.__name__ = reward.__qualname__ = name
    return reward
