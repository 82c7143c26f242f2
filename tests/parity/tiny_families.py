"""Two-layer models of every family in which everything that the family has makes a difference.

Weights are large (std 0.3, queries and keys 0.5), so that soft caps, windows and rotary embeddings change the result
by far more than rounding does; windows are shorter than the sequences; heads are grouped; multipliers are odd.
"""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import torch
import transformers

SLIDING = ["sliding_attention", "full_attention"]
COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, internlm3": ("InternLM3", {}),
    "llama, iquestcoder": ("IQuestCoder", {}),
    "cwm": ("Cwm", {"mlp_bias": True, "sliding_window": 5, "layer_types": SLIDING}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING}),
    "gemma": ("Gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 5,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "vaultgemma": (
        "VaultGemma",
        {
            "sliding_window": 5,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 5,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 10,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": ROPE,
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": 5, "resid_pdrop": 0.1, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.7,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING},
    ),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": SLIDING}),
    "helium": ("Helium", {}),
    "ernie4_5": ("Ernie4_5", {}),
    "glm": ("Glm", {"attention_bias": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "glm4": ("Glm4", {"attention_bias": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "cohere2": ("Cohere2", {"logit_scale": 0.6, "sliding_window": 5, "layer_types": SLIDING}),
    "cohere": ("Cohere", {"logit_scale": 0.6}),
    "cohere, head norms": ("Cohere", {"logit_scale": 0.6, "use_qk_norm": True}),
}
# Older versions of transformers lack some.
FAMILIES = {name: made for name, made in FAMILIES.items() if hasattr(transformers, f"{made[0]}Config")}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(family: str) -> transformers.PreTrainedModel:
    """A random model, in float32, on the CPU, in training mode."""
    prefix, changes = FAMILIES[family]
    values = {**COMMON, **changes}
    config_class = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    if prefix in ("Phi3", "Cohere", "Cohere2"):
        del values["head_dim"]  # they divide the hidden size by the number of heads
    values.setdefault("rope_parameters", {**ROPE})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**values))
    randomize(model)
    return model.train()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Large random values for every parameter, so that none has its neutral value."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or "lora_" in name:
            continue
        if parameter.ndim > 1 and "norm" not in name:
            parameter.normal_(std=0.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 0.3)
        elif "norm" in name:
            # around a half (Gemma stores weights minus one), so that scores do not drown in their own rounding
            parameter.add_(torch.randn_like(parameter) * 0.15 - 0.5)
        else:
            parameter.normal_(std=0.3)


def quantize(model: transformers.PreTrainedModel) -> None:
    """NF4 weights in the place of the blocks' linear layers, as loading with bitsandbytes makes them."""
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or "layers" not in name:
            continue
        new = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=new)
        if module.bias is not None:
            new.bias = module.bias
        new.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.is_loaded_in_4bit = True


def adapt(model: transformers.PreTrainedModel, targets: list[str], **options: object) -> peft.PeftModel:
    """A LoRA adapter of rank 4 with large random A and B."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3 / (4 if "lora_A" in name else 1))
    return adapted.train()


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the second padded by 3."""
    ids = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and the gradients of all that is trained; dropout falls the same way in every run."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(ours: tuple, plain: tuple) -> float:
    """The largest relative difference: of the loss, and of every gradient against its largest element."""
    (our_loss, our_grads), (loss, grads) = ours, plain
    assert our_grads.keys() == grads.keys() and grads
    assert all(grad.abs().max() > 0 for grad in grads.values())
    differences = [(our_grads[name] - grads[name]).abs().max() / grads[name].abs().max() for name in grads]
    return max([(our_loss - loss).abs() / loss, *differences]).item()


def distance(ours: tuple, plain: tuple) -> float:
    """The relative difference of all gradients as one vector: what rounding makes of it depends little on luck."""
    squares = [((ours[1][name] - grad).square().sum(), grad.square().sum()) for name, grad in plain[1].items()]
    return (sum(above for above, _ in squares) / sum(below for _, below in squares)).sqrt().item()
