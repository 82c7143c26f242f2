"""Tiny random models of every causal language model class of transformers, by shrinking configurations generically.

Nothing here knows a family: sizes are recognized by the names of configuration fields. A class that cannot be built
small this way is reported with the reason.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
LARGEST = 2_000_000

WIDTHS = {
    32: "hidden_size d_model n_embd dim embedding_size attention_hidden_size backbone_hidden_size lru_width "
    "mamba_d_ssm hidden_size_per_layer_input text_hidden_size kv_lora_rank q_lora_rank encoder_hidden_size dim_model "
    "dim_model_base",
    48: "intermediate_size ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size block_ff_dim",
    8: "head_dim v_head_dim qk_head_dim kv_channels attention_head_dim swa_head_dim global_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim ssm_state_size "
    "mamba_d_state state_size index_head_dim cross_head_dim qk_nope_head_dim qk_rope_head_dim mamba_d_ssm_head "
    "dim_head chunk_size mamba_chunk_size indexer_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads n_mamba_heads "
    "mamba_n_heads mamba_num_heads swa_num_attention_heads linear_num_value_heads linear_num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size "
    "attention_chunk_size time_step_rank mamba_dt_rank window_size index_topk",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers n_layer "
    "n_layers num_layers encoder_layers decoder_layers num_experts_per_tok num_experts_per_token moe_topk top_k "
    "index_n_heads num_global_key_value_heads",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace num_dense_layers "
    "n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_sequence_length "
    "original_max_position_embeddings",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
}
SIZES = {name: size for size, names in WIDTHS.items() for name in names.split()}


@dataclass(frozen=True)
class Built:
    """A tiny model, or why there is none."""

    model_type: str
    name: str
    model: PreTrainedModel | None
    reason: str = ""


def model_types() -> list[str]:
    """Every model type with a causal language model class, one for each class."""
    seen: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        seen.setdefault(name, model_type)
    return list(seen.values())


def build(model_type: str) -> Built:
    """A tiny random model of ``model_type``, in float32 and evaluation mode."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    reason = ""
    with quiet():
        for lists, pads in ((False, False), (True, False), (False, True), (True, True)):
            try:
                config = shrink(CONFIG_MAPPING[model_type](), lists, pads)
                model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > LARGEST:
                    raise ValueError(f"{size:,} parameters after shrinking")
                torch.manual_seed(0)
                model = randomize(model_class(config).float().eval())
                with torch.no_grad():
                    run(model)
                return Built(model_type, name, model)
            except Exception as error:  # noqa: BLE001  any failure of a foreign class is a line in the report
                reason = reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return Built(model_type, name, None, reason[:160])


def shrink(config: PretrainedConfig, lists: bool, pads: bool) -> PretrainedConfig:
    """A configuration of the same class with small sizes.

    Args:
        config: The class's default.
        lists: Also cut lists with an entry a layer, which most classes derive from the number of layers.
        pads: Also set token ids that lie outside the small vocabulary in sub-configurations of other modalities.
    """
    values = config.to_dict()
    small = shrunk(values, lists)
    del pads
    return type(config)(**small)


def shrunk(values: dict, lists: bool) -> dict:
    """The entries of a configuration that have to change."""
    small: dict = {}
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if n in values), None)
    for name, value in values.items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SIZES[name]) if value > 0 else value
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = value if value < VOCABULARY else VOCABULARY - 1 - len(small) % 8
        elif isinstance(value, dict) and name.endswith("config") and value:
            small[name] = {**value, **shrunk(value, lists)}
        elif lists and isinstance(value, list) and layers and len(value) == layers:
            small[name] = value[: SIZES["num_hidden_layers"]]
    return small


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough to matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
        elif "norm" not in name and "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens; the first third is not trained on."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY - 16, (2, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def run(model: torch.nn.Module):
    """The model's output for :func:`inputs`."""
    return model(**inputs())


@contextlib.contextmanager
def quiet():
    """Without the advice that configurations of unusual sizes cause."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
