"""VaultGemma: gemma2 without norms after attention and MLP."""

from unsloth.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, NormSpec, Scale, Window

SPEC = ModelSpec(
    name="vaultgemma",
    model_types=("vaultgemma",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        scale=Scale("query_pre_attn_scalar", -0.5),
        softcap="attn_logit_softcapping",
        window=Window(),
    ),
    mlp=MlpSpec(activation="hidden_activation"),
    block=BlockSpec(mlp_input_norm="pre_feedforward_layernorm"),
    norm=NormSpec(eps="eps", offset=1.0, weight_last=False),
    embedding_scale=Scale("hidden_size", 0.5),
    logits_softcap="final_logit_softcapping",
)
