"""ERNIE 4.5 (dense): llama with a rotary embedding of neighbours."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec

SPEC = ModelSpec(
    name="ernie4_5",
    model_types=("ernie4_5",),
    attention=AttentionSpec(bias="use_bias", output_bias="use_bias", rotary="neighbours, tables in halves"),
    mlp=MlpSpec(bias="use_bias"),
)
