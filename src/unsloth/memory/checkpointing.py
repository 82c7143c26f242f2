"""Activation (gradient) checkpointing: trade computing time for memory in the backward pass.

Chen et al., 2016, arXiv:1604.06174. A checkpointed layer keeps only its input and computes the rest again when
the backward pass needs it; losses and gradients do not change.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from unsloth.core.errors import ConfigError
from unsloth.memory.budget import Budget

Policy = Literal["unsloth", True, False] | Budget
_ATTRIBUTE = "unsloth_memory"


def validate(policy: object) -> Policy:
    """Return ``policy`` if it is ``"unsloth"``, True, False or a budget; raise :class:`ConfigError` otherwise."""
    if isinstance(policy, bool | Budget) or policy == "unsloth":
        return cast(Policy, policy)
    raise ConfigError(
        "unknown use_gradient_checkpointing",
        got=policy,
        do='Use "unsloth" (the default), True, False, or a Budget of bytes.',
    )


def apply(model: PreTrainedModel, policy: Policy) -> None:
    """Switch checkpointing of ``model``'s layers on or off.

    True recomputes every layer; False keeps everything. ``"unsloth"`` and a budget do as memory allows in layers
    that train as one function (:mod:`unsloth.layers.whole_block`), and recompute others.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.__dict__.pop(_ATTRIBUTE, None)
            if policy is not False:
                module.__dict__[_ATTRIBUTE] = policy
    # transformers renamed these methods during 5.x
    if policy:
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:
            model.gradient_checkpointing_enable(options)
    elif is_on(model):
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()


def policy_of(layer: torch.nn.Module) -> Policy:
    """The policy of one layer, as it is now: False unless its checkpointing is on, whoever switched it."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return layer.__dict__.get(_ATTRIBUTE, True)


def policy_in(model: PreTrainedModel) -> Policy:
    """The policy of the layers of ``model``, as it is now; False where none is checkpointed."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return next((policy for policy in map(policy_of, layers) if policy is not False), False)


def is_on(model: PreTrainedModel) -> bool:
    """Whether any layer of ``model`` is checkpointed."""
    # Read off the instances: the model class has a property of that name that warns in some versions.
    return any(module.__dict__.get("gradient_checkpointing", False) for module in model.modules())
