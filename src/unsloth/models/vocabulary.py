"""The vocabulary's size in the model: token ids checked against the embedding, rows added, new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from peft import PeftModel
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core.errors import AdapterError, ConfigError, TokenizerError
from unsloth.core.log import get_logger
from unsloth.models import record

_MULTIPLE = 64  # rows: matrix products are fast on sizes that are multiples of it
_METHODS = ("mean", "interpolation")

logger = get_logger(__name__)


def rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids must be below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`TokenizerError` if the tokenizer has ids for which the model has no embedding.

    An embedding with more rows than the tokenizer has ids (padded to a round number) is fine.
    """
    largest, available = largest_id(tokenizer), rows(model)
    if largest >= available:
        raise TokenizerError(
            f"the tokenizer has token ids up to {largest}, but the model's embedding has {available} rows",
            do=f"Use the model's own tokenizer, or load with resize_model_vocab={largest + 1} and train "
            "embed_tokens and lm_head.",
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id that ``tokenizer`` can produce."""
    return max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])


@torch.no_grad()
def resize(model: PreTrainedModel, size: int) -> None:
    """Give the embedding and the head ``size`` rows, the new ones the mean of the old; they never shrink.

    Args:
        model: Without adapters.
        size: Rows wanted.
    """
    before = rows(model)
    if size <= before:
        if size < before:
            logger.info("the embedding keeps its %d rows; it is never made smaller than it is", before)
        return
    means = [layer.weight.float().mean(dim=0) for layer in _layers(model)]
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer, mean in zip(_layers(model), means, strict=True):
        layer.weight[before:] = mean.to(layer.weight.dtype)
    mark_changed(model)


def mark_changed(model: PreTrainedModel) -> None:
    """Note that rows of the embedding are not the base model's, so that an adapter is saved together with them."""
    loaded = record.find(model)
    if loaded is not None:
        record.attach(model, dataclasses.replace(loaded, vocabulary_resized=True))


@torch.no_grad()
def add_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Add tokens to the tokenizer and rows for them to the model; call it before ``get_peft_model``.

    Rows that the embedding has to spare are used first; if there are too few, it grows to a multiple of 64, and
    never shrinks. The new rows say nothing until they are trained: target ``embed_tokens`` and ``lm_head`` too.

    Args:
        model: A loaded model without an adapter.
        tokenizer: Its tokenizer, changed in place.
        new_tokens: The texts that shall be one token each. Those that are already are skipped.
        method: ``"mean"`` starts each new row at the mean of all rows; ``"interpolation"`` between that mean and
            the mean of the rows of the tokens that the text consisted of before.
        interpolation: For that method, the weight of the latter, from 0 to 1.

    Raises:
        ConfigError: Not a list of texts, or an unknown method.
        AdapterError: The model has an adapter already.
        TokenizerError: The tokenizer does not make one token of a text.
    """
    wanted = _validated(new_tokens, method, interpolation)
    if isinstance(model, PeftModel):
        raise AdapterError("tokens must be added before the adapter", do="Call add_new_tokens before get_peft_model.")
    vocabulary = tokenizer.get_vocab()
    wanted = [token for token in wanted if token not in vocabulary]
    if not wanted:
        logger.info("all of these are tokens already; nothing was added")
        return
    pieces = {token: tokenizer.encode(token, add_special_tokens=False) for token in wanted}
    used = largest_id(tokenizer) + 1
    means = [layer.weight[:used].float().mean(dim=0) for layer in _layers(model)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in wanted])
    needed = largest_id(tokenizer) + 1
    if needed > rows(model):
        resize(model, -(-needed // _MULTIPLE) * _MULTIPLE)
    for token in wanted:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise TokenizerError("the tokenizer does not make one token of this text", got=token)
        for layer, mean in zip(_layers(model), means, strict=True):
            row = mean
            if method == "interpolation":
                row = torch.lerp(mean, layer.weight[pieces[token]].float().mean(dim=0), interpolation)
            layer.weight[ids[0]] = row.to(layer.weight.dtype)
    mark_changed(model)
    logger.info(
        "%d new tokens; train them with target_modules=[..., 'embed_tokens', 'lm_head'] in get_peft_model", len(wanted)
    )


def _validated(new_tokens: Sequence[str], method: str, interpolation: float) -> list[str]:
    if isinstance(new_tokens, str) or not all(isinstance(token, str) and token for token in new_tokens):
        raise ConfigError("new_tokens must be a list of texts that are not empty", got=new_tokens)
    if method not in _METHODS:
        raise ConfigError("unknown method", got=method, do=f"Use one of: {', '.join(_METHODS)}.")
    if not 0 <= interpolation <= 1:
        raise ConfigError("interpolation is a weight from 0 to 1", got=interpolation)
    return list(dict.fromkeys(new_tokens))


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The input embedding, and the head if it has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return [embedding]
    return [embedding, head]
