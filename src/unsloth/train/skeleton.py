"""A model's structure without its weights: every tensor has a shape and a dtype, and no memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.quantizers.base import get_keys_to_not_convert

from unsloth.core import device
from unsloth.models import adapters, load, plan, record
from unsloth.models.patch import PatchPlan
from unsloth.train import block_memory

_ATTENTION = "unsloth_shapes"
_BLOCK, _NESTED_BLOCK = 64, 256  # of NF4 with double quantization, see quant/nf4.py


@dataclass(frozen=True)
class Skeleton:
    """A model as shapes.

    Attributes:
        model: The model.
        shapes: The mode that its tensors belong to: operations on them must run under it.
        plan: What would be swapped in the loaded model, or None for nothing; the skeleton itself keeps its layers.
        blocks: Its blocks, if they would train as one function each on a GPU.
    """

    model: PreTrainedModel | PeftModel
    shapes: FakeTensorMode
    plan: PatchPlan | None
    blocks: block_memory.Blocks | None


def build(
    config: PretrainedConfig,
    options: load.LoadOptions,
    adapter: adapters.AdapterOptions | None,
    *,
    fast_layers: bool = True,
) -> Skeleton:
    """The model that ``options`` would load, with the adapter, as shapes; one that classifies, with one score.

    Args:
        config: The model's configuration.
        options: How it would be loaded.
        adapter: The adapter to add; None for full fine-tuning.
        fast_layers: Whether the loaded model would get a plan.

    Raises:
        AdapterError: A target of the adapter names no module of this model.
    """
    precision = precision_of(config, options)
    dtype = options.dtype or device.default_dtype()
    weights_dtype = torch.float32 if precision == "full" and options.float32_mixed_precision else dtype
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    auto: Any = options.auto_model or AutoModelForCausalLM
    if auto is AutoModelForSequenceClassification:
        config = _of_reward_model(config)
    with torch.device("meta"):
        model = auto.from_config(
            config,
            dtype=weights_dtype,
            attn_implementation=_ATTENTION,
            trust_remote_code=options.trust_remote_code,
        )
        if precision in ("4bit", "8bit"):
            _quantize(model, precision, dtype)
        model.config.use_cache = False
        record.attach(
            model,
            record.LoadRecord(
                name=options.model_name,
                revision=options.revision,
                precision=precision,
                dtype=dtype,
                max_seq_length=options.max_seq_length,
                gradient_checkpointing=options.use_gradient_checkpointing,
                random_state=options.random_state,
            ),
        )
        adapted = model if precision == "full" else adapters.add(model, adapter or adapters.AdapterOptions())
    # while its weights are still of the classes that loaded ones have
    planned = plan.plan(adapted) if fast_layers else None
    blocks = block_memory.find(plan.plan(adapted, whole=True), record.transformers_model(adapted)) if planned else None
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes:
        _give_shapes(adapted)
    return Skeleton(adapted, shapes, planned, blocks)


def _of_reward_model(config: PretrainedConfig) -> PretrainedConfig:
    """A copy for a model with one score, and a token of padding, which a trainer takes from the tokenizer."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    text = config.get_text_config()
    text.pad_token_id = 0 if text.pad_token_id is None else text.pad_token_id
    return config


def precision_of(config: PretrainedConfig, options: load.LoadOptions) -> record.Precision:
    """The precision that the weights would have: the checkpoint's own if it is quantized by bitsandbytes."""
    own = getattr(config, "quantization_config", None) or {}
    settings = own if isinstance(own, dict) else own.to_dict()
    if settings.get("load_in_4bit"):
        return "4bit"
    return "8bit" if settings.get("load_in_8bit") else options.precision


def _give_shapes(model: torch.nn.Module) -> None:
    """Exchange every tensor of the meta device for one of ``shapes``, which computes as on the CPU; ties stay."""
    made: dict[int, torch.Tensor] = {}

    def exchange(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fresh
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            tensors.update({name: exchange(value) for name, value in found.items()})


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    local_size: int | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that attention gets: none where causal order says it all, else one value a pair of positions."""
    window = local_size is not None and local_size < kv_length
    if attention_mask is None and not window:
        return None
    return torch.ones((batch_size, 1, q_length, kv_length), dtype=torch.bool)


def _quantize(model: PreTrainedModel, precision: record.Precision, dtype: torch.dtype) -> None:
    """Put stand-ins in the place of the linear layers that bitsandbytes quantizes."""
    kept = get_keys_to_not_convert(model)
    for path, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or any(path == key or path.endswith(f".{key}") for key in kept):
            continue
        parent, _, name = path.rpartition(".")
        stand_in = Linear4bit(module, dtype) if precision == "4bit" else _Linear8bit(module, dtype)
        setattr(model.get_submodule(parent), name, stand_in)
    model.is_loaded_in_4bit = precision == "4bit"
    model.is_loaded_in_8bit = precision == "8bit"
    model.is_quantized = True


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """As large as a layer of bitsandbytes, and keeps what that keeps for the backward pass: nothing of its input."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = dtype
        count = linear.weight.numel()
        blocks = -(-count // _BLOCK)
        self.weight = torch.nn.Parameter(torch.empty((-(-count // 2), 1), dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.weight.quant_state = SimpleNamespace(shape=(self.out_features, self.in_features))
        self.absmax = torch.nn.Buffer(torch.empty(blocks, dtype=torch.uint8))
        self.nested_absmax = torch.nn.Buffer(torch.empty(-(-blocks // _NESTED_BLOCK)))
        self.codes = torch.nn.Buffer(torch.empty(16 + 256 + 1))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, of shape [..., out_features]."""
        product = _Product.apply(x.to(self.compute_dtype), self.out_features, False)
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype)


class _Linear8bit(bitsandbytes.nn.Linear8bitLt):
    """As large as a layer of bitsandbytes, which keeps its input for the backward pass."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
        self.scales = torch.nn.Buffer(torch.empty(linear.out_features))
        self.state = bitsandbytes.MatmulLtState()
        self.index = None
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _Product.apply(x, self.out_features, True)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """The shapes of a product with a frozen quantized weight: a dense copy of it exists for as long as it takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int, keeps_input: bool) -> torch.Tensor:
        ctx.in_features = x.shape[-1]
        ctx.kept = x if keeps_input else None
        weight = torch.empty((out_features, x.shape[-1]), dtype=x.dtype)
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = torch.empty((gradient.shape[-1], ctx.in_features), dtype=gradient.dtype)
        return torch.matmul(gradient, weight), None, None
