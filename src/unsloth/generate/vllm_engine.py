"""The protocol of :mod:`unsloth.generate.protocol` on vLLM, where that is installed and asked for.

vLLM reads the base weights from the model's folder and holds them a second time. The model's own adapter is written to
a folder whenever it has changed, and vLLM loads it from there; the base model must not be trained. What vLLM has no
word for is an error. Log-probabilities of tokens are those of the plain model; those under the sampling distribution
stay empty.

Written on vLLM's documented interface (``EngineArgs``, ``LLMEngine``, ``SamplingParams``, ``LoRARequest``).
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from unsloth.core.errors import AdapterError, ConfigError, GenerationError
from unsloth.generate import prompts, sampling
from unsloth.generate.options import EngineOptions
from unsloth.generate.outputs import CompletionOutput, Logprob, RequestOutput
from unsloth.generate.protocol import EngineStats, Lora, LoRARequest, Prompt
from unsloth.generate.sampling import SamplingParams
from unsloth.generate.stepped import SteppedEngine
from unsloth.models import record

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
_SAME_NAMES = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens", "skip_special_tokens", "detokenize",
)  # fmt: skip


class VllmEngine(SteppedEngine):
    """See :class:`unsloth.generate.protocol.Engine`.

    Args:
        model: Loaded from a folder or the hub; with or without an adapter.
        tokenizer: Its tokenizer.
        options: Length, rows, memory, prefix caching and an eight-bit cache are handed on to vLLM.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any = None, options: EngineOptions | None = None) -> None:
        self.tokenizer, self.options = tokenizer, options or EngineOptions()
        self._model, self._inner = model, record.transformers_model(model)
        config = self._inner.config
        loaded = record.find(model)
        own = config.max_position_embeddings
        wanted = self.options.max_model_len or (own if loaded is None else loaded.max_seq_length)
        self.max_model_len = min(wanted, own)
        self._base_values = self._base()
        self._vllm = _import("vllm")
        self._request_class = _import("vllm.lora.request").LoRARequest
        self._engine = self._vllm.LLMEngine.from_engine_args(self._vllm.EngineArgs(**self._arguments()))
        self._folder = tempfile.TemporaryDirectory(prefix="unsloth-vllm-")
        self._numbers = itertools.count(1)
        self._loaded: dict[str, Any] = {}
        self._live: dict[str, tuple[Hashable, Any]] = {}
        self._running: dict[str, RequestOutput] = {}
        self._aborted: list[RequestOutput] = []
        self._counts = {"requests": 0, "finished": 0, "aborted": 0, "prompt": 0, "cached": 0, "generated": 0}
        self._asleep = self._closed = False

    def add_request(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> str:
        """See :meth:`unsloth.generate.protocol.Engine.add_request`."""
        self._check_open()
        accepted = sampling.accept(params)
        vocabulary, hidden = self._inner.get_input_embeddings().weight.shape
        encoded = prompts.encode(prompt, self.tokenizer, vocabulary, hidden)
        if encoded.embeddings is not None:
            raise ConfigError("vLLM is not given embeddings here", do="Pass a text or token ids.")
        room = self.max_model_len - len(encoded.ids)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(encoded.ids)} tokens, and a sequence at most {self.max_model_len}",
                do="Shorten it, or load the model with a larger max_seq_length.",
            )
        name = request_id if request_id is not None else f"request-{next(self._numbers)}"
        if name in self._running:
            raise ConfigError("a request of this id is running", got=name, do="Choose another id.")
        if not self._running:
            self._check_base()
        adapter = self._adapter(lora)
        self._wake()
        limit = min(accepted.max_tokens or room, room)
        given = self._vllm.SamplingParams(**_parameters(dataclasses.replace(accepted, max_tokens=limit)))
        self._engine.add_request(name, {"prompt_token_ids": encoded.ids}, given, lora_request=adapter)
        outputs = [CompletionOutput(i, logprobs=None if accepted.logprobs is None else []) for i in range(accepted.n)]
        self._running[name] = RequestOutput(
            name, encoded.text, encoded.ids, outputs, False, lora=None if adapter is None else adapter.lora_name
        )
        self._counts["requests"] += 1
        return name

    def step(self) -> list[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.Engine.step`."""
        self._check_open()
        ended, self._aborted = self._aborted, []
        if not self._engine.has_unfinished_requests():
            return ended
        return ended + [self._take(found) for found in self._engine.step() if found.request_id in self._running]

    def has_unfinished(self) -> bool:
        """See :meth:`unsloth.generate.protocol.Engine.has_unfinished`."""
        return bool(self._running or self._aborted)

    def abort(self, request_id: str) -> bool:
        """See :meth:`unsloth.generate.protocol.Engine.abort`."""
        known = self._running.pop(request_id, None)
        if known is None:
            return False
        self._engine.abort_request([request_id])
        for output in known.outputs:
            output.finish_reason = output.finish_reason or "abort"
            output.new_text, output.new_token_ids = "", []
        known.finished = True
        self._counts["aborted"] += 1
        self._aborted.append(known)
        return True

    def load_adapter(self, name: str, path: str | Path) -> LoRARequest:
        """See :meth:`unsloth.generate.protocol.Engine.load_adapter`."""
        self._check_open()
        if name in self.live_adapters():
            raise AdapterError("the model itself has an adapter of this name", got=name, do="Choose another name.")
        if not (Path(path) / "adapter_config.json").is_file():
            raise AdapterError("no saved adapter in this folder", got=str(path), do="Pass what save_lora wrote.")
        if name in self._loaded:
            self.unload_adapter(name)
        self._loaded[name] = self._request_class(name, next(self._numbers), str(path))
        return LoRARequest(name, self._loaded[name].lora_int_id, str(path))

    def unload_adapter(self, name: str) -> None:
        """See :meth:`unsloth.generate.protocol.Engine.unload_adapter`."""
        if name not in self._loaded:
            raise AdapterError("no loaded adapter of that name", got=name, do=f"There are: {list(self._loaded)}.")
        used = [running.request_id for running in self._running.values() if running.lora == name]
        if used:
            raise AdapterError("requests still use this adapter", got=name, do="Wait for them, or abort them.")
        self._engine.remove_lora(self._loaded.pop(name).lora_int_id)

    def adapters(self) -> list[str]:
        """See :meth:`unsloth.generate.protocol.Engine.adapters`."""
        return [*self.live_adapters(), *self._loaded]

    known_adapters = adapters

    def live_adapters(self) -> list[str]:
        """Names of the adapters that are the model's own."""
        return list(self._model.peft_config) if isinstance(self._model, PeftModel) else []

    def check(self) -> None:
        """See whether the model as it stands can be run; a ConfigError if not."""
        self._check_open()
        self._check_base()

    def stats(self) -> EngineStats:
        """See :meth:`unsloth.generate.protocol.Engine.stats`; vLLM's cache is its own affair, counted as nothing."""
        counts = self._counts
        return EngineStats(
            waiting=0,
            running=sum(len(running.outputs) for running in self._running.values()),
            pages=0,
            free_pages=0,
            requests=counts["requests"],
            finished=counts["finished"],
            aborted=counts["aborted"],
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            generated_tokens=counts["generated"],
            preemptions=0,
            graphs=0,
            cache_bytes=0,
        )

    def sleep(self) -> None:
        """Give the cache's memory back, and keep vLLM's weights in host memory until the next request.

        Raises:
            ConfigError: Requests are running, which vLLM cannot put to sleep.
        """
        if self._running:
            raise ConfigError("vLLM cannot sleep while requests run", got=list(self._running), do="Abort them first.")
        if not self._asleep and not self._closed:
            self._engine.sleep(level=1)
            self._asleep = True

    def shutdown(self) -> None:
        """See :meth:`unsloth.generate.protocol.Engine.shutdown`."""
        if self._closed:
            return
        self._drop(list(self._running))
        self._closed = True
        self._engine = None
        self._folder.cleanup()

    def _arguments(self) -> dict[str, Any]:
        """Of vLLM's ``EngineArgs``."""
        options, config = self.options, self._inner.config
        ranks = [16]
        if isinstance(self._model, PeftModel):
            ranks += [found.r for found in self._model.peft_config.values()]
        rank = next((size for size in _RANKS if size >= max(ranks)), None)
        if rank is None:
            raise ConfigError("vLLM takes adapters of rank 512 at most", got=max(ranks))
        arguments = {
            "model": config._name_or_path,
            "max_model_len": self.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": max(options.max_num_batched_tokens, self.max_model_len),
            "enable_prefix_caching": options.enable_prefix_caching,
            "enforce_eager": not options.graphs,
            "enable_lora": True,
            "max_lora_rank": rank,
            "enable_sleep_mode": True,
        }
        if options.gpu_memory_utilization is not None:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        if options.float8_kv_cache:
            arguments["kv_cache_dtype"] = "fp8"
        if getattr(self._inner, "is_loaded_in_4bit", False):
            arguments["quantization"] = "bitsandbytes"
        return arguments

    def _check_base(self) -> None:
        if self._base() != self._base_values:
            raise ConfigError(
                "the base model has been trained, and vLLM holds the weights of before",
                got=self._inner.config._name_or_path,
                do='Use the engine of this library: fast_inference=True instead of "vllm".',
            )

    def _base(self) -> Hashable:
        return _fingerprint([p for n, p in self._model.named_parameters() if p.requires_grad and "lora_" not in n])

    def _adapter(self, lora: Any) -> Any:
        """The request to vLLM for the adapter that is asked for; None for the base model."""
        if lora is False:
            return None
        if lora is None:
            names = self._active()
            return self._current(names[0]) if names else None
        name = lora if isinstance(lora, str) else getattr(lora, "lora_name", None)
        if not isinstance(name, str):
            raise AdapterError("no adapter", got=lora, do="Pass its name, or what load_lora returned.")
        if name in self.live_adapters():
            return self._current(name)
        folder = getattr(lora, "lora_path", "")
        if name not in self._loaded and folder:
            self.load_adapter(name, folder)
        if name not in self._loaded:
            known = ", ".join(self.adapters()) or "none"
            raise AdapterError("no adapter of that name", got=name, do=f"There are: {known}. Load it first.")
        return self._loaded[name]

    def _active(self) -> list[str]:
        if not isinstance(self._model, PeftModel):
            return []
        status = self._model.get_model_status()
        if status.merged_adapters:
            raise AdapterError("an adapter is merged into the weights", do="Call unmerge_adapter() first.")
        if status.enabled is False:
            return []
        if len(status.active_adapters) > 1:
            raise AdapterError("several adapters are active at once", got=status.active_adapters, do="Use set_adapter.")
        return list(status.active_adapters)

    def _current(self, name: str) -> Any:
        """The live adapter as vLLM has it; written anew if it has changed and nothing runs on the old one."""
        found = [p for n, p in self._model.named_parameters() if "lora_" in n and f".{name}." in n]
        values = _fingerprint(found)
        known = self._live.get(name)
        if known is not None and (known[0] == values or any(r.lora == name for r in self._running.values())):
            return known[1]
        number = next(self._numbers)
        folder = Path(self._folder.name) / str(number)
        self._model.save_pretrained(str(folder), selected_adapters=[name])
        path = folder if name == "default" else folder / name
        request = self._request_class(name, number, str(path))
        if known is not None:
            self._engine.remove_lora(known[1].lora_int_id)
        self._live[name] = values, request
        return request

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def _take(self, found: Any) -> RequestOutput:
        """What vLLM says of a request so far, added to what is known; completions that it leaves out are as before."""
        known = self._running[found.request_id]
        for output in known.outputs:
            output.new_text, output.new_token_ids = "", []
        for new in found.outputs:
            self._counts["generated"] += _grow(known.outputs[new.index], new)
        known.finished = bool(found.finished)
        known.num_cached_tokens = getattr(found, "num_cached_tokens", None) or 0
        if known.finished:
            del self._running[found.request_id]
            self._counts["finished"] += 1
            self._counts["cached"] += known.num_cached_tokens
            self._counts["prompt"] += len(known.prompt_token_ids) - known.num_cached_tokens
        outputs = [dataclasses.replace(o, token_ids=list(o.token_ids)) for o in known.outputs]
        return dataclasses.replace(known, outputs=outputs)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self.abort(name)
        self._aborted = [output for output in self._aborted if output.request_id not in names]

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError("this engine was shut down", do="Make another one.")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "vLLM was asked for and cannot be imported",
            got=str(error),
            do="pip install vllm, or use the engine of this library (fast_inference=True).",
        ) from error


def _parameters(params: SamplingParams) -> dict[str, Any]:
    """Of vLLM's ``SamplingParams``; the drawn token's log-probability is always asked for."""
    same = {name: getattr(params, name) for name in _SAME_NAMES}
    lists = {"stop": list(params.stop or ()), "stop_token_ids": list(params.stop_token_ids or ())}
    bias = None if params.logit_bias is None else dict(params.logit_bias)
    return same | lists | {"logit_bias": bias, "logprobs": params.logprobs or 0}


def _grow(output: CompletionOutput, new: Any) -> int:
    """Bring a completion up to vLLM's, which holds all of it; returns how many tokens it gained."""
    had, tokens = len(output.token_ids), list(new.token_ids)
    output.new_token_ids = tokens[had:]
    output.new_text = new.text[len(output.text) :]
    output.token_ids, output.text = tokens, new.text
    output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason
    for token, entry in zip(tokens[had:], list(new.logprobs or ())[had:], strict=False):
        output.model_logprobs.append(entry[token].logprob)
        if output.logprobs is not None:
            output.logprobs.append({i: Logprob(x.logprob, x.rank, x.decoded_token) for i, x in entry.items()})
    output.cumulative_logprob = sum(output.model_logprobs)
    return len(tokens) - had


def _fingerprint(tensors: list[torch.Tensor]) -> Hashable:
    """Changes when values do: versions, and norms for optimizers that write past torch."""
    norms = [tensor.detach().float().norm() for tensor in tensors]
    return tuple(t._version for t in tensors), tuple(torch.stack(norms).tolist()) if norms else ()
