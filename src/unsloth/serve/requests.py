"""The bodies of requests, checked before anything is computed.

Fields that the OpenAI interface has and that do not change what is generated here (``user``, ``metadata``, ``store``
and the like) are accepted. Fields that would change it and that this server lacks are an error unless they are unset:
an answer that silently ignores half of the question is worse than none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unsloth.generate.sampling import SamplingParams

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "structured_outputs": (None,),
}
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "verbosity",
}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Sampled(BaseModel):
    """What both kinds of completions have: the sampling parameters under OpenAI's and vLLM's names."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    n: Annotated[int, Field(ge=1)] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> _Sampled:
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            known = "is not supported here; leave it out" if name in _NEUTRAL else "is not a field of this request"
            raise ValueError(f"'{name}' {known}")
        return self

    def sampling(self, defaults: dict[str, Any], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters; what the request leaves open comes from ``defaults``, then from the interface's.

        Raises:
            ConfigError: They make no sense.
        """
        asked = {
            name: getattr(self, name)
            for name in (
                "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "seed", "stop", "stop_token_ids",
            )
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None}
        return SamplingParams(
            **{
                **defaults,
                **given,
                "n": self.n,
                "logit_bias": {_token(key): value for key, value in (self.logit_bias or {}).items()} or None,
                "include_stop_str_in_output": self.include_stop_str_in_output,
                "ignore_eos": self.ignore_eos,
                "min_tokens": self.min_tokens,
                "skip_special_tokens": self.skip_special_tokens,
                "max_tokens": max_tokens,
                "logprobs": logprobs,
            }
        )


def _token(key: str) -> int:
    return int(key) if key.isascii() and key.isdigit() else -1  # -1: refused by SamplingParams, with its message


class CompletionRequest(_Sampled):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatMessage(BaseModel):
    """One message of a chat, in OpenAI's form."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Longest completion in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return None if self.tool_choice == "none" else self.tools or None


class LoadAdapterRequest(BaseModel):
    """``POST /v1/load_lora_adapter``."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(BaseModel):
    """``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
