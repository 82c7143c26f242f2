"""A model of Llama-3.1-8B's shape (or another) with random NF4 weights and a LoRA adapter, made in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes as bnb
import peft
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from unsloth.quant import nf4

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Of the model; the defaults are Llama 3.1 8B's."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256
    rank: int = 32


SHAPES = {
    "8b": Shape(),
    "70b": Shape(80, 8192, 28672, 64, 8),
    "1b": Shape(16, 2048, 8192, 32, 8),
    "0.6b": Shape(28, 1024, 3072, 16, 8, 151936),
    "tiny": Shape(2, 64, 96, 4, 2, 256, 8),
}


def config(shape: Shape, positions: int = 131072) -> transformers.LlamaConfig:
    """Of a model that knows ``positions``."""
    return transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
        use_cache=False,
    )


def build(
    shape: Shape,
    device: torch.device,
    *,
    quantized: bool = True,
    positions: int = 131072,
    full: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.nn.Module:
    """The model with its adapter, in training mode; A random, B random and small, both float32.

    Args:
        shape: Of the model.
        device: Where it is made.
        quantized: Whether the blocks' linear layers are NF4 with double quantization; else bfloat16.
        positions: Longest sequence that the configuration knows.
        full: Whether there is no adapter, and all weights are trained.
        dtype: Of weights, and of the computation where they are quantized.
    """
    configuration = config(shape, positions)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration).to(dtype)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "layers" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear(module, device, quantized, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value = value.fill_(1.0) if parameter.ndim == 1 else value.normal_(std=0.02)
            setattr(model.get_submodule(parent), child, torch.nn.Parameter(value, requires_grad=False))
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(configuration)
    model.is_loaded_in_4bit = quantized
    nf4.keep_layout(model)
    if full:
        return model.requires_grad_(True).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    options = peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, options)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.005)
    return adapted.train()


def _linear(module: torch.nn.Linear, device: torch.device, quantized: bool, dtype: torch.dtype) -> torch.nn.Module:
    weight = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device).normal_(std=0.02)
    if not quantized:
        new = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        new.weight = torch.nn.Parameter(weight, requires_grad=False)
        return new
    four = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    four.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=four
    )
    return four.to(device)
