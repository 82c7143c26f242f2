"""LLM.int8(): eight bits a weight with one scale a row, as bitsandbytes stores them.

Dettmers et al., 2022, arXiv:2208.07339. Activation columns with outliers are multiplied in 16 bits.
"""

from __future__ import annotations

from transformers import BitsAndBytesConfig


def quantization_config() -> BitsAndBytesConfig:
    """How transformers is to quantize a model while loading it."""
    return BitsAndBytesConfig(load_in_8bit=True)
