"""LLM.int8(): eight bits a weight with one scale a row, as bitsandbytes stores them.

Dettmers et al., 2022, arXiv:2208.07339. Activation columns with outliers are multiplied in 16 bits.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def quantization_config() -> BitsAndBytesConfig:
    """How transformers is to quantize a model while loading it."""
    return BitsAndBytesConfig(load_in_8bit=True)


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The values of a ``Linear8bitLt``'s weight, float32 [out_features, in_features]; the module is not touched.

    A weight is ``code * scale / 127`` with one scale a row, which sits on the parameter until the first forward
    pass and on the module's state afterwards.
    """
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return module.weight.data.float() * (scales.float().view(-1, 1) / 127)
