"""Cohere Command R: parallel attention and MLP behind one layer norm, interleaved rotary embedding, scaled logits."""

from unsloth.models.spec import AttentionSpec, BlockSpec, HeadNorm, ModelSpec, NormSpec, Scale

SPEC = ModelSpec(
    name="cohere",
    model_types=("cohere",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        head_norm=HeadNorm(switch="use_qk_norm"),
        rotary="neighbours",
    ),
    block=BlockSpec(mlp_input_norm=None, parallel=True),
    norm=NormSpec(kind="layer", weight_last=False),
    logits_scale=Scale("logit_scale"),
)
