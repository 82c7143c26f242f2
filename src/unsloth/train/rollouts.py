"""Completions for training, sampled by the engine from the weights as they are at the moment."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from unsloth.core.errors import ConfigError, DataError, TrainingError
from unsloth.core.log import get_logger
from unsloth.generate import model_methods, sampling
from unsloth.generate.engine import Engine
from unsloth.generate.live_model import LiveModel
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams
from unsloth.layers import fused_head
from unsloth.models import record

logger = get_logger(__name__)

_CACHE_SHARE = 0.8
"""Of the free memory, for the cache: steps of the engine need some beside it."""


@dataclass(frozen=True)
class Completions:
    """What was sampled for a list of prompts, in their order.

    Attributes:
        ids: Token ids of each completion, the one that ended it included.
        logprobs: Log-probability of each token under the policy at its sampling temperature, as the engine computed
            it; NaN where cuts or penalties hide it.
        finished: Whether each ended by a token or text that ends completions, and was not cut off.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


class Rollouts:
    """Samples completions with an engine of its own, on the weights and the adapter that are being trained.

    Nothing is merged or copied: the engine reads the model's own tensors. Its cache of keys and values has room for
    what a batch needs, and gives its memory back between generations (:meth:`sleep`). What training holds from step to
    step (recorded layers with their memory, dequantized weights) gives way where both do not fit.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        params: How tokens are drawn; ``n`` and ``seed`` are set for each request.
        rows: Completions that are sampled at once.
        group: Completions a prompt, which share its keys and values.
        turns: Whether completions are continued in further turns, as part of the next prompt.

    Raises:
        ConfigError: The engine cannot run this model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        params: SamplingParams,
        rows: int,
        group: int,
        turns: bool = False,
    ) -> None:
        self.params, self.rows, self.group, self.turns = params, rows, group, turns
        self._model, self._tokenizer = model, tokenizer
        methods = model_methods.find(model)
        if methods is not None:
            methods.sleep()  # the engine that the model itself has
        self._options = EngineOptions() if methods is None else methods.options
        self._options = dataclasses.replace(self._options, max_num_seqs=min(self._options.max_num_seqs, rows))
        self._engine: Engine | None = None
        self._room = (0, 0)  # tokens of the longest prompt and of the longest sequence that the cache was made for
        self._wanted = 0  # bytes of the cache
        loaded, config = record.find(model), record.transformers_model(model).config.get_text_config()
        self.longest = min(loaded.max_seq_length if loaded else math.inf, config.max_position_embeddings)
        """Tokens of the longest sequence, prompt and completion together."""
        LiveModel(model, self.longest, self._options.fast).begin()  # says what keeps the engine from this model
        self._seconds, self._tokens = 0.0, 0

    @property
    def dtype(self) -> torch.dtype:
        """What the engine computes in."""
        return record.transformers_model(self._model).get_input_embeddings().weight.dtype

    @property
    def float8(self) -> bool:
        """Whether keys and values are kept in eight bits, which changes probabilities."""
        return self._options.float8_kv_cache

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values right now, which on a GPU is not in torch's own count."""
        return 0 if self._engine is None else self._engine.stats().cache_bytes

    def take_counts(self) -> tuple[float, int]:
        """Seconds spent sampling and tokens sampled since the last call."""
        found = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        return found

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        key: Sequence[int],
        check: Callable[[], None] = lambda: None,
        params: SamplingParams | None = None,
        most: Sequence[int] | None = None,
    ) -> Completions:
        """One completion for every prompt; equal neighbours are sampled as completions of one prompt.

        Args:
            prompts: Token ids of each.
            key: What decides the random numbers, together with the place of a prompt in the list.
            check: Called after every step of the engine; what it raises ends the generation.
            params: In the place of the trainer's.
            most: Tokens that each completion may have, in the place of ``params.max_tokens``.

        Raises:
            DataError: A prompt leaves no room for a completion.
            GenerationError: The device failed.
        """
        start = time.perf_counter()
        params = params or self.params
        groups = _groups(prompts, self.group)
        for ids in prompts:
            if len(ids) >= self.longest:
                text = self._tokenizer.decode(ids[:40])
                raise DataError(
                    f"a prompt of {len(ids)} tokens leaves no room in sequences of {self.longest}",
                    got=f"{text}...",
                    do="Leave such rows out, set max_prompt_length, or load the model with a larger max_seq_length.",
                )
        limits = [self._limit(len(ids), params) for ids in prompts] if most is None else most
        length = max(len(ids) + limit for ids, limit in zip(prompts, limits, strict=True))
        engine = self._engine_for(max(map(len, prompts)), length)
        if not self.cache_bytes:
            self._free_for(self._wanted)
        requests = [
            dataclasses.replace(params, n=stop - first, seed=seed_of(*key, first), max_tokens=limits[first])
            for first, stop in groups
        ]
        outputs = engine.generate([list(prompts[first]) for first, _ in groups], requests, progress=lambda _: check())
        completions = [output for request in outputs for output in request.outputs]
        found = Completions(
            [output.token_ids for output in completions],
            [self._logprobs(output, params) for output in completions],
            [output.finish_reason == "stop" for output in completions],
        )
        self._tokens += sum(map(len, found.ids))
        self._seconds += time.perf_counter() - start
        return found

    def sleep(self) -> None:
        """Give the cache's memory back until the next generation."""
        if self._engine is not None:
            self._engine.sleep()

    def close(self) -> None:
        """Free everything that belongs to the engine."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _logprobs(self, output: Any, params: SamplingParams) -> list[float]:
        if params.temperature == 1:
            return output.model_logprobs
        return [math.nan] * len(output.token_ids) if _cuts(params) else output.sampled_logprobs

    def _limit(self, prompt: int, params: SamplingParams) -> int:
        """Tokens that a completion of a prompt of so many may have."""
        room = self.longest - prompt
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _engine_for(self, prompt: int, length: int) -> Engine:
        """The engine, whose cache is made anew if prompts or sequences have become longer than it was made for.

        Turns of one completion never have that: the first has room for the longest that it may become.
        """
        prompt = 0 if self.turns else prompt  # what turns share is not known
        if self._engine is not None and (prompt > self._room[0] or length > self._room[1]):
            prompt, length = prompt * 5 // 4, length * 5 // 4  # so that it does not grow by a little every time
            self.close()
        if self._engine is None:
            self._room = prompt, min(length, self.longest)
            self._engine = Engine(self._model, self._tokenizer, self._sized(*self._room))
        return self._engine

    def _sized(self, prompt: int, length: int) -> EngineOptions:
        """Options with a cache for all rows at once, or for as many as fit into memory."""
        options = self._options
        if options.num_pages is not None:
            return options
        pages, each = cache_pages(self.rows, self.group, prompt, length, options.page_size), self._page_bytes()
        room = self._free_for(pages * each)
        if pages * each > room:
            alone = cache_pages(1, 1, 0, length, options.page_size)
            wanted, pages = pages, max(int(room / each), alone)
            logger.info(
                "a cache for all %d completions at once would take %.1f GiB, so about %d at a time are sampled",
                self.rows,
                wanted * each / 2**30,
                pages // alone,
            )
        self._wanted = pages * each
        return dataclasses.replace(options, max_model_len=length, num_pages=pages)

    def _free_for(self, wanted: int) -> float:
        """Bytes that a cache may take; if ``wanted`` is more, after training has given back what it holds."""
        room = _CACHE_SHARE * _free_memory()
        if wanted > room:
            keeper = fused_head.keeper_of(record.transformers_model(self._model))
            if keeper is not None:
                keeper.forget()
                room = _CACHE_SHARE * _free_memory()
        return room

    def _page_bytes(self) -> int:
        config = record.transformers_model(self._model).config
        return page_bytes(config, self._options.page_size, 1 if self.float8 else self.dtype.itemsize)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a ``rollout_func``, with an error that says what is missing where TRL would stumble over it."""

    def rolled(prompts: Sequence[Any], trainer: Any) -> Any:
        found = function(prompts, trainer)
        for name in ("prompt_ids", "completion_ids", "logprobs"):
            if name not in found:
                raise TrainingError(f"rollout_func returned no {name}", got=sorted(found), do="Add them.")
            if found[name] is not None and len(found[name]) != len(prompts):
                raise TrainingError(
                    f"rollout_func returned {len(found[name])} {name} for {len(prompts)} prompts",
                    do="Return one of each for every prompt, in their order.",
                )
        return found

    return rolled


def cache_pages(rows: int, group: int, prompt: int, length: int, page: int) -> int:
    """Pages of keys and values that all completions of a generation take at once.

    Args:
        rows: Completions.
        group: Completions of one prompt, which share its full pages.
        prompt: Tokens of the longest prompt; 0 if nothing is shared.
        length: Tokens of the longest sequence, prompt included.
        page: Tokens of a page.
    """
    shared = prompt // page
    return math.ceil(rows / group) * shared + rows * (math.ceil(length / page) + 1 - shared)


def page_bytes(config: PretrainedConfig, page: int, itemsize: int) -> int:
    """Bytes of a page of ``page`` tokens, of all layers of a model."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * page * text.num_hidden_layers * heads * head_dim * itemsize


def _free_memory() -> float:
    """Bytes of the GPU that can be had; infinity without one."""
    if not torch.cuda.is_available():
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def seed_of(*key: int) -> int:
    """A seed below 2^62 that depends on every number of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _groups(prompts: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """First and last-plus-one place of runs of equal prompts, at most ``most`` long."""
    runs, at = [], 0
    for _, run in itertools.groupby(prompts, key=tuple):
        stop = at + sum(1 for _ in run)
        runs += [(first, min(first + most, stop)) for first in range(at, stop, most)]
        at = stop
    return runs


def _cuts(params: SamplingParams) -> bool:
    """Whether tokens are drawn from something else than the softmax of the logits by the temperature."""
    return params.penalized or params.top_p < 1 or params.top_k > 0 or params.min_p > 0 or bool(params.logit_bias)


def sampling_params(args: Any) -> SamplingParams:
    """How a trainer's configuration wants tokens drawn.

    Args:
        args: A ``GRPOConfig``.

    Raises:
        ConfigError: It asks for something the engine does not have, or for no randomness.
    """
    if args.vllm_sampling_params is not None:
        own = sampling.accept(args.vllm_sampling_params)
        if own.temperature not in (1.0, args.temperature):
            raise ConfigError(
                "temperature and that of vllm_sampling_params contradict each other",
                got=f"{args.temperature} and {own.temperature}",
                do="Give one of them: the loss is computed at this temperature, too.",
            )
        changed = {"temperature": args.temperature, "max_tokens": args.max_completion_length}
        return dataclasses.replace(own, **changed, n=1, seed=None, logprobs=None, detokenize=bool(own.stop))
    given = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k or 0,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "max_tokens": args.max_completion_length,
        **(args.generation_kwargs or {}),
    }
    given["detokenize"] = bool(given.get("stop"))
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(SamplingParams)})
    if unknown:
        raise ConfigError("the engine does not know this generation argument", got=unknown[0], do="Leave it out.")
    return SamplingParams(**given)
