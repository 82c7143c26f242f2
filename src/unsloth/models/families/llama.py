"""Llama and all that share its code: Llama 2 and 3, SmolLM2, TinyLlama, Yi, Orpheus, DeepSeek-R1 distillations."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec

SPEC = ModelSpec(
    name="llama",
    model_types=("llama",),
    attention=AttentionSpec(bias="attention_bias", output_bias="attention_bias"),
    mlp=MlpSpec(bias="mlp_bias"),
)
