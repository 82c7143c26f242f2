"""Llama and all that share its code: Llama 2 and 3, SmolLM2, TinyLlama, Yi, Orpheus, InternLM 3, IQuest-Coder."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec

SPEC = ModelSpec(
    name="llama",
    model_types=("llama", "internlm3", "iquestcoder"),
    attention=AttentionSpec(bias="attention_bias", output_bias="attention_bias"),
    mlp=MlpSpec(bias="mlp_bias"),
)
