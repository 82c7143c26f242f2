"""What comes out of the engine: the attributes of vLLM's result objects, and two log-probabilities for every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """One of the most likely tokens of a position.

    Attributes:
        logprob: Natural logarithm of its probability in the plain model (no temperature, penalties or cuts).
        rank: 1 for the most likely token.
        decoded_token: Its text, or None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion, as far as it is generated.

    Attributes:
        index: Of the completion among the n of its request.
        text: All of it so far, without a stop text; text that may yet become one is held back.
        token_ids: All generated tokens, the one that ended it included.
        cumulative_logprob: Sum of ``model_logprobs``.
        logprobs: For every token, the most likely tokens of its position and itself; None if not asked for.
        finish_reason: ``"stop"`` (a stop token or text), ``"length"`` or ``"abort"``; None while it goes on.
        stop_reason: The text or token id of the request's own stops that ended it; None for the model's end tokens.
        sampled_logprobs: Of every token, under the distribution that it was drawn from.
        model_logprobs: Of every token, in the plain model.
        new_text: What ``text`` gained since the request's last output.
        new_token_ids: What ``token_ids`` gained since then.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    sampled_logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    new_text: str = ""
    new_token_ids: list[int] = field(default_factory=list)

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request, as far as it is answered.

    Attributes:
        request_id: As returned by ``add_request``.
        prompt: Its text; None where token ids or embeddings were given.
        prompt_token_ids: Its tokens; empty for embeddings.
        outputs: Its n completions, in order.
        finished: Whether all of them are.
        error: What went wrong inside the engine while it ran; the completions so far are kept, as ``"abort"``.
        lora: Name of the adapter that was asked for, or None.
        num_cached_tokens: Tokens of the prompt whose keys and values were in the cache already.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
    lora: str | None = None
    num_cached_tokens: int = 0
