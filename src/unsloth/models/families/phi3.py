"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, dropout on the residual stream, partial rotary embedding.

How many dimensions are rotated follows from the width of the tables.
"""

from unsloth.models.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Window

SPEC = ModelSpec(
    name="phi3",
    model_types=("phi3",),
    attention=AttentionSpec(projections=("qkv_proj",), window=Window(by_layer_type=False)),
    mlp=MlpSpec(gate_up=("gate_up_proj",)),
    block=BlockSpec(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout"),
)
