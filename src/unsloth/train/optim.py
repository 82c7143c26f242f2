"""Parameter groups of the optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.models import record
from unsloth.train.adamw_8bit import AdamW8bit


def separate_embeddings(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Give the trained embedding and output head of ``model`` groups of their own, with ``learning_rate``.

    Everything else about them (weight decay, betas) stays that of the group they came from. To be called before a
    learning rate schedule is built on the optimizer.

    Args:
        optimizer: The optimizer of all trainable parameters.
        model: The model, with or without adapters.
        learning_rate: Peak rate of the new groups; the schedule scales it like every other.

    Raises:
        ConfigError: Neither the embedding nor the head is trained.
    """
    inner = record.transformers_model(model)
    modules = (inner.get_input_embeddings(), inner.get_output_embeddings())
    chosen = {id(p) for module in modules if module is not None for p in module.parameters() if p.requires_grad}
    if not chosen:
        raise ConfigError(
            "embedding_learning_rate was given, but neither embed_tokens nor lm_head is trained",
            got=learning_rate,
            do='Add "embed_tokens" and "lm_head" to target_modules in get_peft_model, or leave it out.',
        )
    for group in list(optimizer.param_groups):
        embeddings = [p for p in group["params"] if id(p) in chosen]
        if embeddings:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": embeddings, "lr": learning_rate})


def faster(name: str, found: type, options: dict[str, Any], on_gpu: bool) -> tuple[type, dict[str, Any]]:
    """Class and arguments of the optimizer for ``optim=name``: on a GPU our 8-bit AdamW for ``adamw_8bit``.

    Args:
        name: The training argument.
        found: The class that transformers would take.
        options: The arguments it would be given.
        on_gpu: Whether the model is trained on a GPU.
    """
    if name != "adamw_8bit" or not on_gpu:
        return found, options
    own = inspect.signature(AdamW8bit).parameters
    return AdamW8bit, {option: value for option, value in options.items() if option in own}
