"""Code World Model: llama with a window on most layers."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="cwm",
    model_types=("cwm",),
    attention=AttentionSpec(window=Window()),
    mlp=MlpSpec(bias="mlp_bias"),
)
