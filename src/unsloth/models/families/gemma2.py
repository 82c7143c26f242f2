"""Gemma 2: norms before and after attention and MLP, a window on every other layer, soft caps."""

from unsloth.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, NormSpec, Scale, Window

SPEC = ModelSpec(
    name="gemma2",
    model_types=("gemma2",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        scale=Scale("query_pre_attn_scalar", -0.5),
        softcap="attn_logit_softcapping",
        window=Window(),
    ),
    mlp=MlpSpec(activation="hidden_activation"),
    block=BlockSpec(
        attention_norm="post_attention_layernorm",
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    norm=NormSpec(eps="eps", offset=1.0, weight_last=False),
    embedding_scale=Scale("hidden_size", 0.5),
    logits_softcap="final_logit_softcapping",
)
