"""Every family that has a spec. To add one, see docs/families.md."""

from __future__ import annotations

from transformers import PreTrainedModel

from unsloth.models.families import (
    cohere,
    cohere2,
    cwm,
    ernie4_5,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    helium,
    llama,
    ministral,
    mistral,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    vaultgemma,
)
from unsloth.models.spec import ModelSpec

SPECS: tuple[ModelSpec, ...] = (
    cohere.SPEC,
    cohere2.SPEC,
    cwm.SPEC,
    ernie4_5.SPEC,
    gemma.SPEC,
    gemma2.SPEC,
    gemma3.SPEC,
    glm.SPEC,
    glm4.SPEC,
    granite.SPEC,
    helium.SPEC,
    llama.SPEC,
    ministral.SPEC,
    mistral.SPEC,
    phi3.SPEC,
    qwen2.SPEC,
    qwen3.SPEC,
    smollm3.SPEC,
    vaultgemma.SPEC,
)


def find(model: PreTrainedModel) -> ModelSpec | None:
    """The spec of a transformers model's family.

    None where there is none, where the code is not transformers' own, and for a bare decoder without a head, in which
    the paths of specs do not lead anywhere.
    """
    if not type(model).__module__.startswith("transformers.") or model.base_model is model:
        return None
    return next((spec for spec in SPECS if model.config.model_type in spec.model_types), None)
