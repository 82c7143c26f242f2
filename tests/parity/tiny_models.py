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
LARGEST = 8_000_000

WIDTHS = {
    32: "hidden_size d_model n_embd dim embedding_size attention_hidden_size backbone_hidden_size lru_width "
    "mamba_d_ssm hidden_size_per_layer_input text_hidden_size kv_lora_rank q_lora_rank encoder_hidden_size dim_model "
    "dim_model_base",
    48: "intermediate_size ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size block_ff_dim",
    8: "head_dim v_head_dim qk_head_dim kv_channels attention_head_dim swa_head_dim global_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim ssm_state_size "
    "mamba_d_state state_size index_head_dim cross_head_dim qk_nope_head_dim qk_rope_head_dim mamba_d_ssm_head "
    "dim_head chunk_size mamba_chunk_size indexer_head_dim",
    16: "mamba_d_head mamba_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads n_mamba_heads "
    "mamba_n_heads mamba_num_heads swa_num_attention_heads linear_num_value_heads linear_num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size "
    "attention_chunk_size time_step_rank mamba_dt_rank window_size index_topk",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads encoder_layers decoder_layers "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k index_n_heads num_global_key_value_heads",
    0: "num_kv_shared_layers",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace num_dense_layers "
    "n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_sequence_length "
    "original_max_position_embeddings",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
}
BITING = {"logits_scaling": 4.0, "final_logit_softcapping": 2.0, "lm_head_multiplier": 0.4, "logit_scale": 0.3}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
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
    reasons = []
    with quiet():
        # Few layers first; more where a period of different layers does not fit into them.
        for layers, cut in ((2, False), (2, True), (4, False), (4, True), (8, False), (8, True)):
            try:
                config = type(default := CONFIG_MAPPING[model_type]())(**shrunk(default.to_dict(), layers, cut))
                return Built(model_type, name, instantiate(config))
            except Exception as error:  # noqa: BLE001  any failure of a foreign class is a line in the report
                lines = [line for line in str(error).splitlines() if line.strip()] or [""]
                reasons.append(f"{type(error).__name__}: {' '.join(' '.join(lines[:2]).split())}"[:160])
    return Built(model_type, name, None, reasons[0])


def instantiate(config: PretrainedConfig) -> PreTrainedModel:
    """A random model that ran once; its size is looked at before it takes memory."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):  # the class takes the text part alone
        config = config.get_text_config(decoder=True)
    config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters after shrinking")
    torch.manual_seed(0)
    model = randomize(model_class(config).float().eval())
    with torch.no_grad():
        run(model)
    return model


def shrunk(values: dict, layers: int, cut: bool, nested: bool = False) -> dict:
    """What to build a small configuration of the same class from.

    Args:
        values: All entries of the default configuration.
        layers: How many layers.
        cut: Cut lists with an entry a layer, instead of leaving them to the class to derive.
        nested: For a configuration inside another one, which is given whole.
    """
    small = dict(values) if nested else {}
    had = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("config") and name != "per_layer_config" and value:
            small[name] = shrunk(value, layers, cut, nested=True)
        elif isinstance(value, list) and had and len(value) == had:
            small[name] = value[:layers] if cut else None
            if not cut and not nested:
                del small[name]
        else:
            small |= shrunk_number(name, value, layers)
    if cut and values.get("layer_types", ()) is None:
        small["layer_types"] = ["full_attention"] * layers
    if "per_layer_config" in values:
        small["per_layer_config"] = {}
    if "kv_lora_rank" in values:  # multi-head latent attention: as many key heads as heads
        small |= {"num_key_value_heads": 4} | ({"qk_head_dim": 16} if "qk_head_dim" in values else {})
    if "expand" in values and "head_dim" in values:
        small["head_dim"] = values["expand"] * 8  # heads x head size = expanded width
    return small


def shrunk_number(name: str, value: object, layers: int) -> dict:
    """The entry of a size or a token id, if that is what it is and it has to change."""
    if name in LAYERS and isinstance(value, int):
        return {name: layers}
    if value is None and name in ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"):
        return {name: SIZES[name]}
    if name in BITING and value is not None:
        return {name: BITING[name]}
    if name == "is_decoder":
        return {name: True}
    if isinstance(value, bool) or not isinstance(value, int):
        return {}
    if name in SIZES:
        return {name: min(value, SIZES[name])}
    if name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
        return {name: VOCABULARY - 1 - sum(map(ord, name)) % 12}
    return {}


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
