"""NF4: four bits a weight, as bitsandbytes stores them.

A weight is a flat row-major sequence of 4-bit codes (two a byte, high nibble first) into the 16 NormalFloat
values of QLoRA (Dettmers et al., 2023, arXiv:2305.14314); each block of 64 has an absolute maximum, which is
itself quantized to 8 bits ("double quantization"), so a weight costs about 4.13 bits.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from unsloth.core.errors import ModelError
from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4


def quantization_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantize a model while loading it.

    Args:
        compute_dtype: The dtype that weights are dequantized to for a matrix product.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The values of a ``Linear4bit``'s weight, as its forward pass uses them; the module is not touched.

    Returns:
        Shape [out_features, in_features], in the dtype that the weight had before it was quantized.
    """
    from bitsandbytes import functional

    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def dequantize_into(module: torch.nn.Module, out: torch.Tensor) -> torch.Tensor:
    """Write the values of a ``Linear4bit``'s weight into ``out``, which may be a corner of a larger matrix.

    On a GPU by our kernel, on the CPU by bitsandbytes; both give the same bits.

    Args:
        module: Not touched.
        out: [out_features, in_features] with adjacent columns, in any float dtype.

    Returns:
        ``out``.
    """
    if module.weight.is_cuda:
        return dequantize_nf4(NF4Weight.from_quant_state(module.weight, module.weight.quant_state), out=out)
    return out.copy_(dequantize(module))


def keep_layout(model: torch.nn.Module) -> None:
    """Keep every 4-bit layer of ``model`` in its storage layout for good.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight in place at the first evaluation without
    gradients and does not unpack it for training: gradients are silently wrong from then on. Must be called once
    after loading, and before a model that was loaded otherwise is trained. Has no effect on other machines.

    Raises:
        ModelError: A layer was repacked before; its scales were rounded and its gradients would not arrive.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"bitsandbytes has repacked 4-bit weights for evaluation, and they cannot be trained on: {name}",
                do="Load the model again, and do not evaluate it before the trainer or the adapter is made.",
            )
