"""Switching one model between training and inference."""

from __future__ import annotations

from typing import TypeVar

import torch

from unsloth.layers import fused_head
from unsloth.memory import checkpointing
from unsloth.models import record

Model = TypeVar("Model", bound=torch.nn.Module)


def for_inference(model: Model) -> Model:
    """Prepare ``model`` for ``generate``: evaluation mode, key-value cache on, no checkpointing. Returns it.

    What training holds from step to step (recorded layers with their memory, dequantized weights) is given back.
    """
    inner = record.transformers_model(model)
    keeper = fused_head.keeper_of(inner)
    if keeper is not None:
        keeper.forget()
    checkpointing.apply(inner, False)
    inner.config.use_cache = True
    model.eval()
    return model


def for_training(model: Model, use_gradient_checkpointing: checkpointing.Policy | None = None) -> Model:
    """Prepare ``model`` for training: training mode, and the memory policy it was given. Returns it.

    Args:
        model: A model of this library, with or without an adapter.
        use_gradient_checkpointing: Replaces the policy chosen when the model was loaded or adapted.
    """
    inner = record.transformers_model(model)
    policy = use_gradient_checkpointing
    if policy is None:
        loaded = record.find(model)
        policy = loaded.gradient_checkpointing if loaded else True
    checkpointing.apply(inner, checkpointing.validate(policy))
    model.train()
    return model
