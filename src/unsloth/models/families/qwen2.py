"""Qwen2 and Qwen2.5: biases on queries, keys and values; some layers may have a window."""

from unsloth.models.spec import AttentionSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="qwen2",
    model_types=("qwen2",),
    attention=AttentionSpec(bias=True, window=Window()),
)
