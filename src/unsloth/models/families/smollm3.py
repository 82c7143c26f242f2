"""SmolLM3: llama in which some layers have no rotary embedding."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="smollm3",
    model_types=("smollm3",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        window=Window(),
        rotary_switch="use_rope",
    ),
    mlp=MlpSpec(bias="mlp_bias"),
)
