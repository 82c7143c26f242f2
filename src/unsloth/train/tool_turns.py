"""What answers a model's turns: calls of tools, or an environment that talks."""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsloth.core.errors import TrainingError
from unsloth.core.log import get_logger
from unsloth.data import tool_calls
from unsloth.rewards.time_limit import execute_with_time_limit
from unsloth.train.turns import End, Episode, Message

Tool = Callable[..., Any]

logger = get_logger(__name__)


@dataclass
class ToolCalls:
    """Runs the calls in a model's turns, as TRL does.

    Whatever goes wrong with a call is told to the model as ``{"error": ...}`` and counted. An exception out of a tool
    that is no ``ValueError``, and so may be a fault of the tool, is also logged, once for each tool and type.

    Attributes:
        episodes: Whose turns they are.
        tools: For each episode, its tools by name, ordinary and ``async`` ones.
        environments: For each episode the one whose methods are among the tools, or none at all. Where its attribute
            ``over`` is true after a call, the episode ends.
        seconds: Wall-clock limit of a call; None for no limit.
        turns: Of the model in an episode; calls in the last one are not run. None for no limit.
        run_together: Awaitables → their results or exceptions, in order.
        said: What was logged already.
        count, failed, malformed: Calls so far, those of them that failed, and turns with a call that cannot be read.
    """

    episodes: Sequence[Episode]
    tools: Sequence[Mapping[str, Tool]]
    environments: Sequence[Any]
    seconds: float | None
    turns: int | None
    run_together: Callable[[list[Any]], list[Any]]
    said: set[tuple[str, str]] = field(default_factory=set)
    count: int = 0
    failed: int = 0
    malformed: int = 0

    def reply(self, numbers: Sequence[int]) -> list[Sequence[Message] | End]:
        """The answers to the last turns of some episodes; see :func:`unsloth.train.turns.play`."""
        found = [self._results(number) if self._may(number) else [] for number in numbers]
        waiting = [(results, place) for results in found for place, (_, value) in enumerate(results) if _waits(value)]
        values = self.run_together([results[place][1] for results, place in waiting]) if waiting else []
        for (results, place), value in zip(waiting, values, strict=True):
            name = results[place][0]
            results[place] = (name, self._failure(name, value) if isinstance(value, Exception) else value)
        return [self._answer(number, results) for number, results in zip(numbers, found, strict=True)]

    def _answer(self, number: int, results: list[tuple[str, Any]]) -> Sequence[Message] | End:
        if not results:
            return "answered" if self._may(number) else "too many turns"
        messages = [{"role": "tool", "name": name, "content": str(value)} for name, value in results]
        if self.environments and getattr(self.environments[number], "over", False):
            self.episodes[number].messages += messages
            return "over"
        return messages

    def _may(self, number: int) -> bool:
        """Whether the calls of an episode's last turn may still be answered."""
        calls = self.episodes[number].messages[-1].get("tool_calls")
        return not calls or self.turns is None or self.episodes[number].turns < self.turns

    def _results(self, number: int) -> list[tuple[str, Any]]:
        """Name and result of each call in an episode's last turn."""
        message = self.episodes[number].messages[-1]
        calls = message.get("tool_calls") or []
        self.malformed += not calls and tool_calls.looks_like_one(message["content"])
        found = []
        for call in calls:
            if self.environments and getattr(self.environments[number], "over", False):
                break  # the calls of this turn before have ended the game
            self.count += 1
            function = call.get("function") or {}
            name = str(function.get("name", "unknown"))
            found.append((name, self._call(self.tools[number], name, function.get("arguments"))))
        return found

    def _call(self, tools: Mapping[str, Tool], name: str, arguments: Any) -> Any:
        tool = tools.get(name)
        if tool is None:
            return self._refused(f"Tool {name} not found. There are: {', '.join(tools)}.")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                return self._refused(f"The arguments of {name} are not JSON.")
        if not isinstance(arguments, Mapping):
            return self._refused(f"The arguments of {name} must be a mapping from name to value.")
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return self._refused(f"{name}: {error}.")
        try:
            if inspect.iscoroutinefunction(tool):
                return asyncio.wait_for(tool(**arguments), self.seconds)
            limited = execute_with_time_limit(self.seconds)(tool) if self.seconds is not None else tool
            return limited(**arguments)
        except Exception as error:  # noqa: BLE001 - the model is told, which is TRL's protocol
            return self._failure(name, error)
        except SystemExit as error:
            raise TrainingError(
                f"the tool {name!r} ended the program", got=error, do="Let it raise ValueError."
            ) from error

    def _refused(self, why: str) -> dict[str, str]:
        self.failed += 1
        return {"error": why}

    def _failure(self, name: str, error: Exception) -> dict[str, str]:
        if isinstance(error, TimeoutError):
            return self._refused(f"{name} took longer than {self.seconds:g} seconds.")
        key = (name, type(error).__name__)
        if not isinstance(error, ValueError) and key not in self.said:  # a ValueError is how a tool refuses
            self.said.add(key)
            place = _place(error)
            logger.warning("the tool %s raised %s: %s (%s); the model is told, and it is counted", *key, error, place)
        return self._refused(str(error))


@dataclass
class Talk:
    """Lets environments answer, in plain text.

    Attributes:
        episodes: Whose turns they are.
        environments: One for each; ``next_turn(text of the model) -> str``, or None when it is over.
        seconds: Wall-clock limit of an answer; None for no limit.
    """

    episodes: Sequence[Episode]
    environments: Sequence[Any]
    seconds: float | None

    def reply(self, numbers: Sequence[int]) -> list[Sequence[Message] | End]:
        """The answers to the last turns of some episodes.

        Raises:
            TrainingError: An environment raised, took too long, or answered with something that is no text.
        """
        return [self._answer(self.environments[number], self.episodes[number].messages[-1]) for number in numbers]

    def _answer(self, environment: Any, message: Message) -> Sequence[Message] | End:
        where, turn = f"{type(environment).__name__}.next_turn", environment.next_turn
        limited = execute_with_time_limit(self.seconds)(turn) if self.seconds is not None else turn
        try:
            answer = limited(message["content"])
        except (Exception, SystemExit) as error:
            raise TrainingError(
                f"{where} raised {type(error).__name__}: {error} ({_place(error)})",
                got=message["content"],
                do="Answer moves that are not allowed with a text.",
            ) from error
        if answer is None or (getattr(environment, "over", False) and not answer):
            return "over"
        if not isinstance(answer, str):
            raise TrainingError(f"{where} must return a text, or None when it is over", got=answer)
        return "over" if getattr(environment, "over", False) else [{"role": "user", "content": answer}]


def _waits(value: Any) -> bool:
    return inspect.isawaitable(value)


def _place(error: BaseException) -> str:
    """File and line that an exception comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "no traceback"
