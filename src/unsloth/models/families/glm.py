"""GLM-4 9B: gate and up in one layer, partial rotary embedding of neighbours."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec

SPEC = ModelSpec(
    name="glm",
    model_types=("glm",),
    attention=AttentionSpec(bias="attention_bias", rotary="neighbours, tables in halves"),
    mlp=MlpSpec(gate_up=("gate_up_proj",)),
)
