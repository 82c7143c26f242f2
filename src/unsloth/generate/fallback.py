"""Generation by transformers, one prompt at a time, with the engine's parameters and results.

For families without a description. Slow, but nothing is ignored: what transformers does not have is an error.
"""

from __future__ import annotations

from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.generate import prompts as reader
from unsloth.generate import results, sampling
from unsloth.generate.outputs import CompletionOutput, RequestOutput
from unsloth.generate.sampling import SamplingParams
from unsloth.generate.text import TextStream
from unsloth.models import record


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Any, params: Any, lora: Any) -> list[RequestOutput]:
    """As :meth:`unsloth.generate.engine.Engine.generate`.

    Raises:
        ConfigError: A parameter or an adapter that only the engine knows.
    """
    if lora is not None:
        raise ConfigError("adapters by name need the engine", got=lora, do="Leave lora_request out.")
    many = [prompts] if reader.is_single(prompts) else list(prompts)
    each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
    if len(each) != len(many):
        raise ConfigError("parameters must be one for all prompts, or one for each", got=f"{len(many)}, {len(each)}")
    inner = record.transformers_model(model)
    vocabulary, hidden = inner.get_input_embeddings().weight.shape
    outputs = []
    for i, (prompt, own) in enumerate(zip(many, each, strict=True)):
        accepted = sampling.accept(own)
        _check(accepted)
        encoded = reader.encode(prompt, tokenizer, vocabulary, hidden)
        if encoded.embeddings is not None:
            raise ConfigError("embeddings need the engine", do="Pass a text or token ids.")
        outputs.append(_one(model, tokenizer, f"request-{i}", encoded, accepted))
    return outputs


def _check(params: SamplingParams) -> None:
    lacking = {
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": params.logit_bias,
        "logprobs": params.logprobs,
    }
    for name, value in lacking.items():
        if value:
            raise ConfigError(f"{name} needs the engine, which has no description of this model", got=value)


def _one(model: Any, tokenizer: Any, name: str, encoded: reader.Encoded, params: SamplingParams) -> RequestOutput:
    inner = record.transformers_model(model)
    ends = results.stop_ids(inner, tokenizer, params.ignore_eos, params.stop_token_ids or ())
    ids = torch.tensor([encoded.ids], device=inner.device)
    sampled: dict[str, Any] = {"do_sample": False}
    if not params.greedy:
        top_k = params.top_k if params.top_k > 0 else 0
        sampled = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": top_k}
        sampled["min_p"] = params.min_p or None
    if params.seed is not None:
        torch.manual_seed(params.seed)
    found = type(model).generate(
        model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens or inner.config.max_position_embeddings - ids.shape[1],
        min_new_tokens=params.min_tokens or None,
        repetition_penalty=params.repetition_penalty,
        num_return_sequences=params.n,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        return_dict_in_generate=True,
        output_logits=True,
        **sampled,
    )
    new = found.sequences[:, ids.shape[1] :].tolist()
    plain = torch.stack(found.logits, 1).float().log_softmax(-1)
    outputs = [_completion(i, tokens, plain[i], ends, tokenizer, params) for i, tokens in enumerate(new)]
    return RequestOutput(name, encoded.text, encoded.ids, outputs, True)


def _completion(
    index: int, tokens: list[int], plain: torch.Tensor, ends: frozenset[int], tokenizer: Any, params: SamplingParams
) -> CompletionOutput:
    """One row, up to its end or its first stop text; the sampled log-probabilities are not known."""
    output = CompletionOutput(index)
    stops = params.stop if isinstance(params.stop, tuple) else ()
    text = None
    if tokenizer is not None and params.detokenize:
        text = TextStream(tokenizer, stops, params.skip_special_tokens, keep_stop=params.include_stop_str_in_output)
    for i, token in enumerate(tokens):
        output.token_ids.append(token)
        output.model_logprobs.append(float(plain[i, token]))
        if token in ends:
            output.finish_reason = "stop"
            output.stop_reason = token if token in (params.stop_token_ids or ()) else None
            break
        found = None if text is None else text.add(token)
        if found is not None:
            output.finish_reason, output.stop_reason = "stop", found
            break
    if text is not None and not isinstance(output.stop_reason, str):
        text.finish()
    output.finish_reason = output.finish_reason or "length"
    output.cumulative_logprob = sum(output.model_logprobs)
    output.text = output.new_text = "" if text is None else text.text
    output.new_token_ids = list(output.token_ids)
    return output
