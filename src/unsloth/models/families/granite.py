"""Granite 3 (dense): llama with four multipliers."""

from unsloth.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Scale

SPEC = ModelSpec(
    name="granite",
    model_types=("granite",),
    attention=AttentionSpec(bias="attention_bias", output_bias="attention_bias", scale=Scale("attention_multiplier")),
    mlp=MlpSpec(bias="mlp_bias"),
    block=BlockSpec(residual_scale=Scale("residual_multiplier")),
    embedding_scale=Scale("embedding_multiplier"),
    logits_scale=Scale("logits_scaling", -1.0),
)
