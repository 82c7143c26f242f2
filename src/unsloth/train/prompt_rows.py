"""Rows of prompts, for training on a model's own completions: what they must have, and their token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from unsloth.core.errors import ConfigError, DataError
from unsloth.data import render
from unsloth.data.tables import as_dataset

_FROM_TRAINER = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def encode_prompt(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any],
    tools: Sequence[Any] = (),
    template: str | None = None,
) -> list[int]:
    """Token ids of a prompt; of messages by the chat template, up to where the answer begins.

    Args:
        prompt: A text, or a list of messages.
        tokenizer: The tokenizer.
        variables: For the chat template.
        tools: What the model may call.
        template: In the place of the tokenizer's own.

    Raises:
        TokenizerError: There are messages, and no template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    if template is None:
        render.require_template(tokenizer)
    ids = tokenizer.apply_chat_template(
        prompt,
        tools=list(tools) or None,
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
        **variables,
    )
    return list(ids)


def prompt_rows(rows: Any, more: Mapping[str, Any] | None = None) -> Any:
    """A data set with prompts; a mapping is taken part by part.

    Args:
        rows: A data set, or a list of mappings.
        more: Further arguments of the trainer; an environment needs no rows, and no prompts in them.

    Raises:
        ConfigError: There is none.
        DataError: It has no prompts, or a row whose prompt is none.
    """
    more = more or {}
    if rows is None:
        if more.get("environment_factory") is None and not more.get("eval"):
            raise ConfigError("train_dataset is missing", got=None, do="Pass a data set or a list of mappings.")
        return None
    if isinstance(rows, Mapping):
        return {name: prompt_rows(part, more) for name, part in rows.items()}
    if not isinstance(rows, Dataset | IterableDataset):
        rows = as_dataset(rows)
    if isinstance(rows, Dataset):
        _check_prompts(rows, more)
    return rows


def _check_prompts(rows: Dataset, more: Mapping[str, Any]) -> None:
    if not len(rows):
        raise DataError("the data set has no rows", do="Pass some.")
    if "prompt" not in rows.column_names:
        if more.get("environment_factory") is not None:
            return
        near = next((name for name in ("question", "problem", "messages", "text") if name in rows.column_names), None)
        raise DataError(
            "the rows have no column 'prompt'",
            got=rows.column_names,
            do=f"Rename it: dataset.rename_column({near!r}, 'prompt')." if near else "Add one.",
        )
    for number, prompt in enumerate(rows["prompt"]):
        messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)
        if not messages and not (isinstance(prompt, str) and prompt):
            raise DataError(f"row {number} has no prompt", got=prompt, do="A prompt is a text, or a list of messages.")
        if messages and not is_conversational({"prompt": prompt}):
            raise DataError(f"row {number}: its messages have no role and content", got=prompt)
    if "chat_template_kwargs" in rows.column_names:
        for number, variables in enumerate(rows["chat_template_kwargs"]):
            if not isinstance(variables, Mapping | None):
                raise DataError(
                    f"row {number}: chat_template_kwargs is no mapping",
                    got=variables,
                    do='Write a mapping of variables of the chat template, such as {"enable_thinking": False}.',
                )


def check_columns(functions: Sequence[Any], rows: Any, more: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if a reward function asks for a column that there is not."""
    if not functions and more.get("environment_factory") is None:
        raise ConfigError("reward_funcs is missing", do="Pass a function, or a list of functions.")
    if more.get("rollout_func") is not None or more.get("environment_factory") is not None:
        return  # which may add columns
    for function in functions:
        if isinstance(function, str | nn.Module):
            continue
        if not callable(function):
            raise ConfigError("a reward function cannot be called", got=function, do="Pass the function itself.")
        if isinstance(rows, Dataset):
            missing = [name for name in _needed(function) if name not in (*rows.column_names, *_FROM_TRAINER)]
            if missing:
                raise ConfigError(
                    f"reward {getattr(function, '__name__', type(function).__name__)!r} needs the column "
                    f"{missing[0]!r}, which the rows do not have",
                    got=rows.column_names,
                    do="Add it, or give the parameter a default.",
                )


def _needed(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
