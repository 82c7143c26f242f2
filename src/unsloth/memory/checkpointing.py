"""Activation (gradient) checkpointing: trade computing time for memory in the backward pass.

Chen et al., 2016, arXiv:1604.06174. A checkpointed layer keeps only its input and computes the rest again when
the backward pass needs it; losses and gradients do not change.
"""

from __future__ import annotations

from typing import Literal, cast

from transformers import PreTrainedModel

from unsloth.core.errors import ConfigError

Policy = Literal["unsloth", True, False]


def validate(policy: object) -> Policy:
    """Return ``policy`` if it is one of ``"unsloth"``, True, False; raise :class:`ConfigError` otherwise."""
    if isinstance(policy, bool) or policy == "unsloth":
        return cast(Policy, policy)
    raise ConfigError(
        "unknown use_gradient_checkpointing", got=policy, do='Use "unsloth" (the default), True or False.'
    )


def apply(model: PreTrainedModel, policy: Policy) -> None:
    """Switch checkpointing of ``model``'s layers on or off.

    ``"unsloth"`` and True recompute every layer; False keeps everything.
    """
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


def is_on(model: PreTrainedModel) -> bool:
    """Whether any layer of ``model`` is checkpointed."""
    # Read off the instances: the model class has a property of that name that warns in some versions.
    return any(module.__dict__.get("gradient_checkpointing", False) for module in model.modules())
