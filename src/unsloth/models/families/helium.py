"""Helium: llama with a rotary embedding of neighbours."""

from unsloth.models.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec

SPEC = ModelSpec(
    name="helium",
    model_types=("helium",),
    attention=AttentionSpec(bias="attention_bias", rotary="neighbours, tables in halves"),
    mlp=MlpSpec(bias="mlp_bias"),
    norm=NormSpec(weight_last=False),
)
