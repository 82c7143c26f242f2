"""GLM-4-0414 and GLM-Z1: glm with norms after attention and MLP as well."""

from unsloth.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec

SPEC = ModelSpec(
    name="glm4",
    model_types=("glm4",),
    attention=AttentionSpec(bias="attention_bias", rotary="neighbours, tables in halves"),
    mlp=MlpSpec(gate_up=("gate_up_proj",)),
    block=BlockSpec(attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"),
)
