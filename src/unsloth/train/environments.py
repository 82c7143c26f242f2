"""Environments and tools in training: the model acts, something answers, and only the model's own tokens are trained.

Two kinds, after TRL's protocol (``docs/environments.md``). An environment with ``reset`` whose other public methods are
tools, called through the chat template; tools may also be plain functions. And one with ``reset`` and ``next_turn``,
which is a conversation in plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import add_response_schema, parse_response, supports_tool_calling
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth.core.errors import ConfigError
from unsloth.data import tool_calls
from unsloth.train.tool_turns import Talk, ToolCalls
from unsloth.train.turns import Episode, Limits, Message, Turns, play, text_between

NEXT_TURN = "next_turn"
"""The method that makes an environment a conversation."""


@dataclasses.dataclass(frozen=True)
class Conversations:
    """An environment that is a conversation: its class, and instances, which are used again."""

    factory: Callable[[], Any]
    pool: list[Any]

    @property
    def kind(self) -> type:
        """Its class."""
        return type(self.pool[0])

    def take(self, count: int) -> list[Any]:
        """So many instances."""
        while len(self.pool) < count:
            self.pool.append(self.factory())
        return self.pool[:count]

    def rewards(self) -> list[Callable[..., list[float]]]:
        """The environment's own reward as a reward function, if it has one."""
        if not hasattr(self.kind, "get_reward"):
            return []

        def reward(environments: Sequence[Any], **columns: Any) -> list[float]:
            return [environment.get_reward() for environment in environments]

        reward.__name__ = self.kind.__name__
        return [reward]


def conversations(factory: Any) -> Conversations | None:
    """What ``environment_factory`` makes, if it is a conversation; None if its methods are tools.

    Raises:
        ConfigError: It makes something that is no environment.
    """
    if factory is None:
        return None
    factories = list(factory.values()) if isinstance(factory, Mapping) else [factory]
    if not factories or not all(callable(one) for one in factories):
        raise ConfigError("environment_factory must make environments", got=factory, do="Pass the class itself.")
    made = [one() for one in factories]
    for environment in made:
        if not callable(getattr(environment, "reset", None)):
            raise ConfigError(
                "an environment needs a method reset(**row)", got=type(environment).__name__, do="Add one."
            )
    talking = [environment for environment in made if hasattr(type(environment), NEXT_TURN)]
    if not talking:
        return None
    if len(made) > 1:
        raise ConfigError(
            f"environments with {NEXT_TURN} cannot be mixed with others",
            got=[type(environment).__name__ for environment in made],
            do="Make one class that chooses by the row in reset.",
        )
    return Conversations(factories[0], made)


def placeholder_rows(args: Any) -> Dataset:
    """Rows without content, for an environment that says everything itself."""
    if args.max_steps <= 0:
        raise ConfigError("without a data set, max_steps must say how long to train", got=args.max_steps)
    rows = args.generation_batch_size // args.num_generations
    return Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}] * rows)


def check_prompts(rows: Any) -> None:
    """Raise :class:`ConfigError` unless prompts are lists of messages, which environments need."""
    if not isinstance(rows, Dataset | IterableDataset):
        return
    first = next(iter(rows), None)
    if first is not None and isinstance(first.get("prompt"), str):
        raise ConfigError(
            "environments and tools need prompts that are lists of messages",
            got=first["prompt"],
            do='Write {"prompt": [{"role": "user", "content": ...}]}.',
        )


@contextlib.contextmanager
def tools_accepted(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> Iterator[None]:
    """A block in which TRL takes tools with any chat template that can show calls, not only with those it knows.

    Raises:
        ConfigError: The template cannot.
    """
    if not wanted:
        yield
        return
    if not supports_tool_calling(tokenizer):
        raise ConfigError(
            "the chat template shows no calls of tools, or not what they return",
            do=f"Use a model or template that does, or an environment with {NEXT_TURN}, which needs no tools.",
        )
    with warnings.catch_warnings(), _placeholder(tokenizer):
        warnings.filterwarnings("ignore", "You are using 'environment_factory', which is an experimental")
        yield


@contextlib.contextmanager
def _placeholder(tokenizer: Any) -> Iterator[None]:
    """A block in which TRL does not look for its way of reading calls, if it has none for this template."""
    given = getattr(tokenizer, "response_template", None), getattr(tokenizer, "response_schema", None)
    if given != (None, None) or _known_to_trl(tokenizer):
        yield
        return
    tokenizer.response_template = {}
    try:
        yield
    finally:
        tokenizer.response_template = None


def _known_to_trl(tokenizer: Any) -> bool:
    try:
        add_response_schema(tokenizer)
    except ValueError:
        return False
    return True


class Environments(TRLTrainer):
    """What a trainer needs for environments, before TRL's class; see :class:`unsloth.train.grpo.GRPOTrainer`.

    Of a batch, all completions that go on are continued together, by :func:`unsloth.train.turns.play`.
    """

    _conversations: Conversations | None = None
    _played: Sequence[Episode] | None = None
    """The newest completions of several turns."""
    _finished: Sequence[bool] | None = None
    """Whether each of the completions sampled last ended by itself; None where that is for their last tokens to say."""
    rollouts: Any
    sample: Any
    _tools_of: Any
    _variables_of: Any

    def _set_up_environments(self, found: Conversations | None) -> None:
        """Let completions be conversations with ``found``, or with tools; to be called once the trainer is built."""
        self._conversations = found
        self._said: set[tuple[str, str]] = set()
        if found is not None:
            self.rollout_func = self._talk
        self._reads_calls = getattr(self._tokenizer, "response_template", None) is not None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As in TRL, which resets ``environments`` and shows the model what they say."""
        if self._conversations is not None:
            self.environments = self._conversations.take(len(inputs))
        return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> Any:
        """As in TRL; a conversation is the list of its messages, not one text."""
        self._played = None
        found = list(super()._generate(prompts))
        if self._played is not None:
            found[3] = [episode.messages for episode in self._played]
            mode = "train" if self.model.training else "eval"
            count = len(self._played)
            self._metrics[mode]["environment/turns"].append(sum(e.turns for e in self._played) / count)
            self._metrics[mode]["environment/cut_ratio"].append(sum(e.cut for e in self._played) / count)
        return tuple(found)

    def _talk(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """The ``rollout_func`` of conversations."""
        prompt_ids, images, fields = self._tokenize_prompts(prompts)
        count = self.num_generations if self.model.training else self.num_generations_eval
        ids, logprobs = self._generate_single_turn(prompt_ids, images, fields, count)
        episodes = self._episodes(prompt_ids, ids, logprobs, [[self._plain(0, turn)] for turn in ids])
        self._play(episodes, Talk(episodes, self.environments, self.args.tool_time_limit).reply, self._plain)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [episode.ids for episode in episodes],
            "logprobs": None if logprobs is None else [episode.logprobs for episode in episodes],
            "env_mask": [episode.mask for episode in episodes],
        }

    def _tool_call_loop(
        self,
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list[list[Message]],
        logprobs: list[list[float]] | None,
        images: Any,
        multimodal_fields: Any,
    ) -> Any:
        """As in TRL; a game that is ``over`` ends, and calls that cannot be read or run are counted."""
        if self._is_vlm:
            return super()._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields
            )
        if not self._reads_calls:  # or TRL has done it
            completions = [[self._with_calls(number, ids)] for number, ids in enumerate(completion_ids)]
        episodes = self._episodes(prompt_ids, completion_ids, logprobs, completions)
        tools = [{**plain, **slow} for plain, slow in zip(self._sync_tool_dicts, self._async_tool_dicts, strict=True)]
        calls = ToolCalls(
            episodes,
            tools,
            self.environments or (),
            self.args.tool_time_limit,
            self._limits.turns,
            self._run_together,
            self._said,
        )
        self._play(episodes, calls.reply, self._with_calls)
        mode = "train" if self.model.training else "eval"
        turns = sum(episode.turns for episode in episodes)
        self._metrics[mode]["tools/malformed_frequency"].append(calls.malformed / turns)
        return (
            [episode.mask for episode in episodes],
            [episode.messages for episode in episodes],
            [episode.ids for episode in episodes],
            None if logprobs is None else [episode.logprobs for episode in episodes],
            calls.count,
            calls.failed,
            [[] for _ in episodes],
        )

    # Parts of both

    def _play(self, episodes: list[Episode], reply: Any, read: Any) -> None:
        self._played = episodes
        play(episodes, self._limits, reply, self._between, self._sample_turns, read)

    def _episodes(self, prompts: Any, ids: Any, logprobs: Any, messages: Any) -> list[Episode]:
        return [
            Episode(
                prompts[number],
                list(turn),
                [1] * len(turn),
                None if logprobs is None else list(logprobs[number]),
                messages[number],
                finished,
            )
            for number, (turn, finished) in enumerate(zip(ids, self._ends(ids), strict=True))
        ]

    def _ends(self, ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the model ended each of the turns sampled last itself."""
        if self._finished is not None:
            return list(self._finished)
        return [bool(turn) and turn[-1] in self.eos_token_ids for turn in ids]

    @property
    def _limits(self) -> Limits:
        config = self.model.config.get_text_config()
        longest = config.max_position_embeddings if self.rollouts is None else self.rollouts.longest
        turns = self.args.max_tool_calling_iterations
        return Limits(
            self.max_completion_length, longest, None if turns is None else turns + 1, frozenset(self.eos_token_ids)
        )

    def _sample_turns(self, prompts: list[list[int]], most: list[int]) -> Turns:
        if self.rollouts is None:
            ids, logprobs = self._generate_single_turn(prompts, None, {}, 1)
            return Turns(ids, logprobs, self._ends(ids))
        found = self.sample(prompts, most=most)
        return Turns(found.ids, found.logprobs, found.finished)

    def _between(self, number: int, messages: Sequence[Message], ended: bool) -> list[int]:
        """Token ids from a turn of the model, whose end token it wrote itself or not, up to the next one."""
        options = {**self.chat_template_kwargs, **self._variables_of(number)}

        def render(conversation: list[Message]) -> str:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, chat_template=self.chat_template, **options
            )

        ends = self._tokenizer.convert_ids_to_tokens(sorted(set(self.eos_token_ids)))
        text = text_between(render, messages, ends)
        if ended:
            text = next((text.removeprefix(end) for end in ends if text.startswith(end)), text)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _plain(self, number: int, ids: list[int]) -> Message:
        return {"role": "assistant", "content": self._tokenizer.decode(ids, skip_special_tokens=True)}

    def _with_calls(self, number: int, ids: list[int]) -> Message:
        """A turn of the model as a message, with its calls of tools."""
        if self._reads_calls:
            prefix = self._played[number].prompt_ids if self._played else []
            return parse_response(self._tokenizer, ids, prefix=prefix, tools=self._tools_of(number))
        ended = bool(ids) and ids[-1] in self.eos_token_ids
        text = self._tokenizer.decode(ids[:-1] if ended else ids)  # special tokens may mark calls
        content, calls = tool_calls.split(text)
        if not calls:
            return {"role": "assistant", "content": content}
        functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
        found = [{"type": "function", "function": function} for function in functions]
        return {"role": "assistant", "content": content, "tool_calls": found}

    def _run_together(self, waiting: list[Any]) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*waiting, return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(gather(), self.async_loop).result()
