"""The engine: takes requests, lets the scheduler decide and the runner compute, and hands out results.

On a GPU a step is begun before the results of the one before it are read, so the device does not wait for Python. A
sequence whose end is found in those results has then been computed once too often; that token is thrown away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch

from unsloth.core.errors import AdapterError, ConfigError, GenerationError
from unsloth.core.log import get_logger
from unsloth.generate import kv_cache, loaded_adapter, prompts, results, sampling
from unsloth.generate.kv_cache import CacheShape, KVCache
from unsloth.generate.live_model import Change, LiveModel
from unsloth.generate.options import EngineOptions
from unsloth.generate.outputs import CompletionOutput, RequestOutput
from unsloth.generate.pages import PagePool
from unsloth.generate.protocol import EngineStats, Lora, LoRARequest, Prompt
from unsloth.generate.runner import Launch, Runner
from unsloth.generate.scheduler import Scheduler
from unsloth.generate.sequence import Request, Sequence
from unsloth.generate.stepped import SteppedEngine
from unsloth.generate.text import TextStream
from unsloth.models import record

logger = get_logger(__name__)

_SEEDS = 2**62

_Chosen = tuple[str | None, int | None]
"""Name and slot of an adapter; None for the base model."""


class Engine(SteppedEngine):
    """See :class:`unsloth.generate.protocol.Engine`.

    Args:
        model: Of a family with a spec; it stays the caller's, and may be trained between generations.
        tokenizer: None where only token ids come and no text is wanted.
        options: How the device is used.

    Raises:
        ConfigError: The engine cannot run this model, or there is no room for a cache.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any = None, options: EngineOptions | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options = options or EngineOptions()
        inner = record.transformers_model(model)
        own = inner.config.max_position_embeddings
        loaded = record.find(model)
        wanted = options.max_model_len or (own if loaded is None else loaded.max_seq_length)
        self.max_model_len = min(wanted, own)
        self._live = LiveModel(model, self.max_model_len, options.fast)
        decoder = self._live.decoder
        shape = CacheShape(
            layers=len(decoder.layers),
            key_heads=decoder.key_heads,
            head_dim=decoder.head_dim,
            dtype=torch.float8_e4m3fn if options.float8_kv_cache else decoder.dtype,
            device=decoder.device,
            page_size=options.page_size,
        )
        pages = kv_cache.choose_pages(shape, options, self.max_model_len, self._reserve(inner.config))
        if (pages - 1) * options.page_size < self.max_model_len:
            self.max_model_len = (pages - 1) * options.page_size
            logger.warning("the cache holds %d tokens, so no sequence can be longer", self.max_model_len)
        self._cache = KVCache(shape, pages)
        self._pool = PagePool(pages, options.page_size, options.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._pool, options.max_num_seqs, options.max_num_batched_tokens, self.max_model_len
        )
        self._runner = Runner(self._live, self._cache, options.max_num_seqs, self.max_model_len, options.graphs)
        self._overlaps = decoder.device.type == "cuda"
        self._requests: dict[str, Request] = {}
        self._pending: list[Launch] = []
        self._cache_key = 0
        self._numbers = itertools.count()
        self._counts = {"requests": 0, "finished": 0, "aborted": 0, "prompt": 0, "cached": 0, "generated": 0}
        self._idle, self._closed = True, False

    def add_request(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> str:
        """See :meth:`unsloth.generate.protocol.Engine.add_request`."""
        self._check_open()
        self._begin()
        return self._add(prompt, params, request_id, self._choose(lora))

    def _add(self, prompt: Prompt, params: Any, request_id: str | None, chosen: _Chosen) -> str:
        accepted = sampling.accept(params)
        decoder = self._live.decoder
        encoded = prompts.encode(prompt, self.tokenizer, decoder.vocabulary, decoder.hidden_size)
        room = self.max_model_len - len(encoded.ids)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(encoded.ids)} tokens, and a sequence at most {self.max_model_len}",
                do="Shorten it, or load the model with a larger max_seq_length.",
            )
        if accepted.logit_bias and max(accepted.logit_bias) >= decoder.vocabulary:
            raise ConfigError("logit_bias names a token that the model does not have", got=max(accepted.logit_bias))
        if accepted.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer", got=accepted.stop, do="Use stop_token_ids.")
        name = request_id if request_id is not None else f"request-{next(self._numbers)}"
        if name in self._requests:
            raise ConfigError("a request of this id is running", got=name, do="Choose another id.")
        adapter, slot = chosen
        request = Request(
            id=name,
            prompt=encoded.text,
            prompt_ids=encoded.ids,
            embeddings=encoded.embeddings,
            params=accepted,
            lora=adapter,
            stop_ids=results.stop_ids(
                self._live.inner, self.tokenizer, accepted.ignore_eos, accepted.stop_token_ids or ()
            ),
            max_tokens=min(accepted.max_tokens or room, room),
        )
        seed = accepted.seed if accepted.seed is not None else int(torch.randint(_SEEDS, ()))
        request.sequences = [self._sequence(request, slot, seed, i) for i in range(accepted.n)]
        self._requests[name], self._idle = request, False
        self._counts["requests"] += 1
        for sequence in request.sequences:
            self._scheduler.add(sequence)
        return name

    def step(self) -> list[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.Engine.step`.

        If the device fails, every request is over, and its last output says why (``error``).

        Raises:
            GenerationError: The engine was shut down.
        """
        self._check_open()
        try:
            self._advance()
        except (
            RuntimeError,
            ArithmeticError,
            ValueError,
        ) as error:  # out of memory, a failed launch
            self._fail(next(iter(str(error).strip().splitlines()), type(error).__name__))
        return self._report()

    def has_unfinished(self) -> bool:
        """See :meth:`unsloth.generate.protocol.Engine.has_unfinished`."""
        return bool(self._requests)

    def abort(self, request_id: str) -> bool:
        """See :meth:`unsloth.generate.protocol.Engine.abort`."""
        request = self._requests.get(request_id)
        if request is None or request.finished:
            return False
        for sequence in request.sequences:
            if sequence.state != "finished":
                self._finish(sequence, "abort")
        self._counts["aborted"] += 1
        request.changed = True
        return True

    def _add_each(self, requests: Iterable[tuple[Prompt, Any, Any]], names: list[str]) -> None:
        self._check_open()
        self._begin()
        chosen: dict[int, _Chosen] = {}  # by identity of what asked for it: nothing changes between these requests
        for prompt, params, lora in requests:
            if id(lora) not in chosen:
                chosen[id(lora)] = self._choose(lora)
            names.append(self._add(prompt, params, None, chosen[id(lora)]))
            self._requests[names[-1]].pieces = False

    def load_adapter(self, name: str, path: str | Path) -> LoRARequest:
        """See :meth:`unsloth.generate.protocol.Engine.load_adapter`."""
        self._check_open()
        self._begin()
        bank = self._live.bank
        if name in bank.live():
            raise AdapterError("the model itself has an adapter of this name", got=name, do="Choose another name.")
        tensors = loaded_adapter.read(Path(path), self._live.decoder.projections())
        self._check_unused(name)
        bank.loaded[name] = tensors
        self._pool.forget_all()
        return LoRARequest(name, 0, str(path))

    def unload_adapter(self, name: str) -> None:
        """See :meth:`unsloth.generate.protocol.Engine.unload_adapter`."""
        bank = self._live.bank
        if name not in bank.loaded:
            raise AdapterError("no loaded adapter of that name", got=name, do=f"There are: {list(bank.loaded)}.")
        self._check_unused(name)
        bank.forget(name)

    def adapters(self) -> list[str]:
        """See :meth:`unsloth.generate.protocol.Engine.adapters`."""
        self._begin()
        return self.known_adapters()

    def known_adapters(self) -> list[str]:
        """As :meth:`adapters`, as of the last generation; may be called from any thread."""
        return self._live.bank.names()

    def live_adapters(self) -> list[str]:
        """Names of the adapters that are the model's own."""
        self._begin()
        return self._live.bank.live()

    def check(self) -> None:
        """See whether the model as it stands can be run.

        Raises:
            ConfigError: It has parts that cannot be computed from its family's description.
            AdapterError: It has an adapter that cannot be applied without merging.
        """
        self._check_open()
        self._begin()
        active = self._live.bank.active()
        if active is not None:
            self._live.bank.require(active)

    def stats(self) -> EngineStats:
        """See :meth:`unsloth.generate.protocol.Engine.stats`."""
        counts, graphs = self._counts, self._runner.graphs
        return EngineStats(
            waiting=self._scheduler.waiting,
            running=self._scheduler.running,
            pages=self._pool.pages - 1 if self._cache.held else 0,
            free_pages=self._pool.free,
            requests=counts["requests"],
            finished=counts["finished"],
            aborted=counts["aborted"],
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            generated_tokens=counts["generated"],
            preemptions=self._scheduler.preemptions,
            graphs=0 if graphs is None else len(graphs),
            cache_bytes=self._cache.bytes,
            graph_seconds=0.0 if graphs is None else graphs.seconds,
        )

    def sleep(self) -> None:
        """See :meth:`unsloth.generate.protocol.Engine.sleep`."""
        self._collect()
        self._scheduler.preempt_all()
        self._pool.forget_all()
        self._cache.release()

    def shutdown(self) -> None:
        """See :meth:`unsloth.generate.protocol.Engine.shutdown`."""
        if self._closed:
            return
        self._drop(list(self._requests))
        self.sleep()
        self._runner.forget_graphs()
        self._closed = True

    def _sequence(self, request: Request, slot: int | None, seed: int, index: int) -> Sequence:
        params = request.params
        output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        text = None
        if params.detokenize and self.tokenizer is not None:
            stops = params.stop if isinstance(params.stop, tuple) else ()
            text = TextStream(
                self.tokenizer, stops, params.skip_special_tokens, keep_stop=params.include_stop_str_in_output
            )
        sequence = Sequence(request, seed + index, slot, output, text)
        sequence.tokens, sequence.length = list(request.prompt_ids), len(request.prompt_ids)
        return sequence

    def _choose(self, lora: Any) -> _Chosen:
        adapter = self._adapter(lora)
        return adapter, None if adapter is None else self._live.bank.require(adapter)

    def _adapter(self, lora: Any) -> str | None:
        """The name of the adapter that is asked for, loaded if need be; None for the base model."""
        bank = self._live.bank
        if lora is None:
            return bank.active()
        if self._live.has_trained_copies():
            raise AdapterError(
                "this model has layers that were trained in full (modules_to_save), which every request would share",
                got=f"lora={lora}",
                do="Leave the adapter out to use the model as it stands, or save it and load the base without it.",
            )
        if lora is False:
            return None
        name = lora if isinstance(lora, str) else getattr(lora, "lora_name", None)
        if not isinstance(name, str):
            raise AdapterError("no adapter", got=lora, do="Pass its name, or what load_lora returned.")
        path = getattr(lora, "lora_path", "")
        if name not in bank.names() and path:
            self.load_adapter(name, path)
        return name

    def _begin(self) -> None:
        """Look at the model before the first request of a generation."""
        if self._idle:
            self._heed(self._live.begin())

    def _heed(self, change: Change) -> None:
        if change.storage:
            self._runner.forget_graphs()
        if change.values:
            self._pool.forget_all()

    def _advance(self) -> None:
        self._heed(self._live.look())
        self._cache.take()
        if self._cache_key != self._cache.key():
            self._runner.forget_graphs()
            self._cache_key = self._cache.key()
        plan = self._scheduler.schedule(may_preempt=not self._pending)
        if plan is None:
            self._collect()
            plan = self._scheduler.schedule()
            assert plan is not None
        before, self._pending = self._pending, []
        if not plan.empty:
            self._pending = self._runner.launch(plan)
            self._counts["prompt"] += sum(chunk.stop - chunk.start for chunk in plan.chunks)
        for launch in before:
            self._take(launch)
        if not self._overlaps:
            self._collect()

    def _collect(self) -> None:
        """Read all results that are under way."""
        pending, self._pending = self._pending, []
        for launch in pending:
            self._take(launch)

    def _take(self, launch: Launch) -> None:
        drawn = launch.wait()
        for at, sequence in enumerate(launch.sequences):
            if sequence.state == "finished":
                continue
            self._counts["generated"] += 1
            reason = results.append(sequence, drawn, at, self.max_model_len, self.tokenizer)
            if reason is not None:
                self._finish(sequence, reason)
            elif (len(sequence.tokens) - 1) % self._pool.size == 0:
                sequence.known = self._pool.remember(
                    sequence.root, sequence.tokens[:-1], sequence.pages, sequence.known
                )

    def _finish(self, sequence: Sequence, reason: Any) -> None:
        sequence.output.finish_reason = reason
        sequence.request.changed = sequence.request.changed or sequence.request.finished_but(sequence)
        if reason == "abort" and sequence.text is not None:
            sequence.text.finish()
        self._scheduler.remove(sequence)

    def _report(self) -> list[RequestOutput]:
        outputs = []
        for request in [request for request in self._requests.values() if request.changed]:
            outputs.append(results.report(request))
            if request.finished:
                del self._requests[request.id]
                self._counts["finished"] += all(s.output.finish_reason != "abort" for s in request.sequences)
                self._counts["cached"] += request.cached
        if not self._requests and not self._idle:
            self._idle = True
            if self.options.standby:
                self.sleep()
        return outputs

    def _fail(self, reason: str) -> None:
        """End every request, after an error of the device."""
        logger.error("generation failed: %s", reason)
        self._pending = []
        for request in self._requests.values():
            request.error = reason
            self.abort(request.id)
        self._pool.forget_all()
        self._runner.forget_graphs()

    def _drop(self, names: Many[str]) -> None:
        """Abort requests whose results nobody wants."""
        for name in names:
            self.abort(name)
            self._requests.pop(name, None)
        if not self._requests:
            self._idle = True

    def _check_unused(self, name: str) -> None:
        used = [request.id for request in self._requests.values() if request.lora == name and not request.finished]
        if used:
            raise AdapterError("requests still use this adapter", got=name, do="Wait for them, or abort them.")

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError("this engine was shut down", do="Make another one.")

    def _reserve(self, config: Any) -> int:
        """Bytes that the largest step takes besides weights and cache, roughly."""
        tokens, rows = self.options.max_num_batched_tokens, self.options.max_num_seqs
        return 2 * tokens * (4 * config.intermediate_size + 8 * config.hidden_size) + 12 * rows * config.vocab_size
