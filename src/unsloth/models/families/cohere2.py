"""Cohere Command R7B and Command A: cohere whose sliding layers alone have a rotary embedding."""

from unsloth.models.spec import AttentionSpec, BlockSpec, ModelSpec, NormSpec, Scale, Window

SPEC = ModelSpec(
    name="cohere2",
    model_types=("cohere2",),
    attention=AttentionSpec(
        bias="attention_bias",
        output_bias="attention_bias",
        window=Window(),
        rotary="neighbours",
        rotary_switch="sliding_window",
    ),
    block=BlockSpec(mlp_input_norm=None, parallel=True),
    norm=NormSpec(kind="layer", weight_last=False),
    logits_scale=Scale("logit_scale"),
)
