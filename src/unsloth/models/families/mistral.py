"""Mistral: llama with a window that slides over all layers."""

from unsloth.models.spec import AttentionSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="mistral",
    model_types=("mistral",),
    attention=AttentionSpec(window=Window(by_layer_type=False)),
)
