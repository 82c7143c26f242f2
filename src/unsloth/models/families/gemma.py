"""Gemma: norms whose weights are stored minus one, scaled embeddings, GELU."""

from unsloth.models.spec import AttentionSpec, ModelSpec, NormSpec, Scale

SPEC = ModelSpec(
    name="gemma",
    model_types=("gemma",),
    attention=AttentionSpec(bias="attention_bias", output_bias="attention_bias"),
    norm=NormSpec(eps="eps", offset=1.0, weight_last=False),
    embedding_scale=Scale("hidden_size", 0.5),
)
