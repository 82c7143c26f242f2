"""FP8 checkpoints: eight-bit floating-point weights with one scale a block, as DeepSeek, Qwen and Mistral ship them.

A weight W of shape [N, K] is stored as ``weight`` in float8 (E4M3: 4 bits of exponent, 3 of mantissa, up to 448)
and ``weight_scale_inv`` of shape [ceil(N / b), ceil(K / b)] for blocks of b x b (128 x 128 as shipped), or one number
for the whole matrix:

    W[n, k] = weight[n, k] * weight_scale_inv[n // b, k // b]

The name says "inverse" because it is the inverse of what the weight was multiplied by when it was quantized
(DeepSeek-V3, 2024, arXiv:2412.19437, section 3.3). Here such a checkpoint is a source of ordinary weights only:
tensors are dequantized one at a time while a model is loaded, so it may be quantized anew at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

SCALE_SUFFIX = "_scale_inv"
_LARGEST = 448.0  # of E4M3


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """The values of a stored weight.

    Args:
        weight: float8, [..., N, K].
        scale: One number, or [..., ceil(N / block[0]), ceil(K / block[1])], floating-point.
        block: Height and width of a block; None if ``scale`` is one number for the matrix.

    Returns:
        float32, [..., N, K].

    Raises:
        ValueError: The scales do not cover the weight.
    """
    values, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return values * scale
    rows, columns = values.shape[-2:]
    if block is None or scale.shape[-2:] != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit a weight of shape {tuple(weight.shape)}")
    spread = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return values.mul_(spread)


def quantize(values: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of :func:`dequantize`, each block scaled so that its largest entry becomes 448.

    Args:
        values: [N, K].
        block: Height and width of a block.

    Returns:
        The weight (float8 E4M3, [N, K]) and its scales (float32, [ceil(N / block[0]), ceil(K / block[1])]).
    """
    rows, columns = values.shape
    down, across = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    padded = values.new_zeros(down * block[0], across * block[1], dtype=torch.float32)
    padded[:rows, :columns] = values
    blocks = padded.view(down, block[0], across, block[1])
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    stored = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
    return stored.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


class StoredWeight:
    """A weight that is read from its file and dequantized when it is indexed, as transformers does to load it.

    Args:
        file: An open safetensors file.
        name: The weight's name in it.
        scale_file: The open file that holds the scale (another one, where a shard ends between the two).
        block: Height and width of a block, or None.
    """

    def __init__(self, file: Any, name: str, scale_file: Any, block: tuple[int, int] | None) -> None:
        self._file, self._name, self._scale_file, self._block = file, name, scale_file, block

    def __getitem__(self, index: Any) -> torch.Tensor:
        scale = self._scale_file.get_tensor(self._name + SCALE_SUFFIX)
        return dequantize(self._file.get_tensor(self._name), scale, self._block)[index]

    def get_shape(self) -> list[int]:
        """The weight's shape, as of a safetensors slice."""
        return self._file.get_slice(self._name).get_shape()

    def get_dtype(self) -> str:
        """The dtype it is read as, as of a safetensors slice."""
        return "F32"


def block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of a ``quantization_config``; None where each weight has one scale."""
    size = quantization.get("weight_block_size")
    return None if size is None else (int(size[0]), int(size[1]))
