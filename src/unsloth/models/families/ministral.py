"""Ministral: mistral whose window slides over some layers only."""

from unsloth.models.spec import AttentionSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="ministral",
    model_types=("ministral",),
    attention=AttentionSpec(window=Window()),
)
