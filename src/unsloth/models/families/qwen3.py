"""Qwen3 (dense): norms of every head of queries and keys; some layers may have a window."""

from unsloth.models.spec import AttentionSpec, HeadNorm, ModelSpec, Window

SPEC = ModelSpec(
    name="qwen3",
    model_types=("qwen3",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        window=Window(),
        head_norm=HeadNorm(),
    ),
)
