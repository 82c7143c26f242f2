"""Options of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsloth.core.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """How an engine uses its device.

    Attributes:
        max_model_len: Longest sequence, prompt and completion together; None takes the model's own length.
        max_num_seqs: Sequences that run at once; more wait.
        max_num_batched_tokens: Prompt tokens that one step takes at most; longer prompts are taken in pieces.
        page_size: Tokens of a page of the cache.
        num_pages: Pages of the cache; None sizes it by memory.
        gpu_memory_utilization: Share of the device's memory that weights, cache and everything else may have; the
            cache gets what the rest leaves of it. None: half of what is free. At most what ``max_num_seqs`` need.
        float8_kv_cache: Keep keys and values in eight bits.
        enable_prefix_caching: Keep the pages of finished prompts until their memory is needed.
        graphs: Capture decoding steps as CUDA graphs; no effect on a CPU.
        standby: Give the cache's memory back whenever nothing is left to generate.
        fast: False computes with the plain references of all kernels.
        backend: ``"own"``, the engine of this library on the model's own weights; ``"vllm"``, vLLM on a copy that it
            loads itself (see :mod:`unsloth.generate.vllm_engine`).
    """

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float | None = None
    float8_kv_cache: bool = False
    enable_prefix_caching: bool = True
    graphs: bool = True
    standby: bool = False
    fast: bool = True
    backend: Literal["own", "vllm"] = "own"

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages"):
            value = getattr(self, name)
            optional = name in ("max_model_len", "num_pages")
            if not (optional and value is None) and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive whole number", got=value)
        if self.backend not in ("own", "vllm"):
            raise ConfigError("no such backend of generation", got=self.backend, do='There are "own" and "vllm".')
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "gpu_memory_utilization must be above 0 and at most 1",
                got=self.gpu_memory_utilization,
                do="It is a share of the device's memory: 0.5 is half of it.",
            )
