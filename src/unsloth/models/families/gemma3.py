"""Gemma 3, text only: Gemma 2 with norms of the heads, and a rotary embedding for each type of layer.

Attention is not capped: transformers reads the configuration's attribute, and does not use it.
"""

from unsloth.models.spec import AttentionSpec, BlockSpec, HeadNorm, MlpSpec, ModelSpec, NormSpec, Scale, Window

SPEC = ModelSpec(
    name="gemma3",
    model_types=("gemma3_text",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        scale=Scale("query_pre_attn_scalar", -0.5),
        window=Window(),
        head_norm=HeadNorm(),
    ),
    mlp=MlpSpec(activation="hidden_activation"),
    block=BlockSpec(
        attention_norm="post_attention_layernorm",
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    norm=NormSpec(eps="eps", offset=1.0, weight_last=False),
    embedding_scale=Scale("hidden_size", 0.5),
    rotary_by_layer_type=True,
    logits_softcap="final_logit_softcapping",
)
