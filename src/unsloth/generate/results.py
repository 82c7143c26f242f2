"""From drawn tokens to results: ends of completions, texts and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unsloth.generate.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from unsloth.generate.sequence import Request, Sequence


@dataclass(frozen=True)
class Drawn:
    """Tokens of several sequences, as :class:`unsloth.generate.sampler.Sampled`, on the host."""

    tokens: list[int]
    sampled: list[float]
    model: list[float]
    ranks: list[int] | None
    top_values: list[list[float]] | None
    top_ids: list[list[int]] | None


def stop_ids(model: Any, tokenizer: Any, ignore_eos: bool, own: Iterable[int]) -> frozenset[int]:
    """The tokens that end a completion: those of the model and its tokenizer, and the request's own."""
    ids = set(own)
    if not ignore_eos:
        for source in (model.generation_config, model.config, tokenizer):
            found = getattr(source, "eos_token_id", None)
            ids |= set(found) if isinstance(found, list | tuple) else {found} if isinstance(found, int) else set()
    return frozenset(ids)


def append(sequence: Sequence, drawn: Drawn, at: int, max_len: int, tokenizer: Any) -> FinishReason | None:
    """Add the token at place ``at`` of a launch to a sequence; returns why it ends now, or None."""
    request, output = sequence.request, sequence.output
    token = drawn.tokens[at]
    sequence.tokens.append(token)
    output.token_ids.append(token)
    output.new_token_ids.append(token)
    output.sampled_logprobs.append(drawn.sampled[at])
    output.model_logprobs.append(drawn.model[at])
    output.cumulative_logprob += output.model_logprobs[-1]
    if output.logprobs is not None:
        output.logprobs.append(_most_likely(drawn, at, token, request.params.logprobs or 0, tokenizer))
    request.changed = request.changed or request.pieces
    return _end(sequence, token, max_len)


def _end(sequence: Sequence, token: int, max_len: int) -> FinishReason | None:
    request, output = sequence.request, sequence.output
    params, count = request.params, len(output.token_ids)
    if token in request.stop_ids and count > params.min_tokens:
        output.stop_reason = token if token in (params.stop_token_ids or ()) else None
        if sequence.text is not None:
            sequence.text.finish()
        return "stop"
    found = None if sequence.text is None else sequence.text.add(token, count > params.min_tokens)
    if found is not None:
        output.stop_reason = found
        return "stop"
    if count >= request.max_tokens or len(sequence.tokens) >= max_len:
        if sequence.text is not None:
            sequence.text.finish()
        return "length"
    return None


def _most_likely(drawn: Drawn, at: int, token: int, count: int, tokenizer: Any) -> dict[int, Logprob]:
    """The most likely tokens of a position, and the one that was drawn."""

    def text(i: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([i])

    assert drawn.ranks is not None and drawn.top_ids is not None and drawn.top_values is not None
    ids, values = drawn.top_ids[at][:count], drawn.top_values[at][:count]
    found = {i: Logprob(v, rank, text(i)) for rank, (i, v) in enumerate(zip(ids, values, strict=True), 1)}
    found.setdefault(token, Logprob(drawn.model[at], drawn.ranks[at], text(token)))
    return found


def report(request: Request) -> RequestOutput:
    """What is known of a request now; what is new in it is not new next time."""
    outputs = []
    for sequence in request.sequences:
        output = sequence.output
        if sequence.text is not None:
            shown = len(output.text)
            output.text = sequence.text.text
            output.new_text = output.text[shown:]
        outputs.append(_snapshot(output))
        output.new_text, output.new_token_ids = "", []
    request.changed = False
    return RequestOutput(
        request.id,
        request.prompt,
        [] if request.embeddings is not None else request.prompt_ids,
        outputs,
        request.finished,
        request.error,
        request.lora,
        request.cached,
    )


def _snapshot(output: CompletionOutput) -> CompletionOutput:
    """A copy that later tokens do not change."""
    return CompletionOutput(
        index=output.index,
        text=output.text,
        token_ids=list(output.token_ids),
        cumulative_logprob=output.cumulative_logprob,
        logprobs=None if output.logprobs is None else list(output.logprobs),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        sampled_logprobs=list(output.sampled_logprobs),
        model_logprobs=list(output.model_logprobs),
        new_text=output.new_text,
        new_token_ids=output.new_token_ids,
    )
