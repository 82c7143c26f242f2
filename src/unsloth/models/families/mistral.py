"""Mistral: llama with a window that slides over all layers."""

from unsloth.models.spec import AttentionSpec, ModelSpec

SPEC = ModelSpec(
    name="mistral",
    model_types=("mistral",),
    attention=AttentionSpec(window="sliding_window"),
)
