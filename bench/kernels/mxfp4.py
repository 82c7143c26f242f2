"""MXFP4 dequantization against torch.compile: python bench/kernels/mxfp4.py [--dry-run]."""

import torch
from harness import Case, compiled, device, main

from unsloth.kernels.mxfp4 import dequantize_mxfp4, dequantize_mxfp4_reference


def cases(small: bool) -> list[Case]:
    n, k = (16, 128) if small else (4096, 14336)
    blocks = torch.randint(0, 256, (n, k // 32, 16), device=device(), dtype=torch.uint8)
    scales = torch.randint(118, 134, (n, k // 32), device=device(), dtype=torch.uint8)
    reference = compiled(dequantize_mxfp4_reference)
    return [
        Case(
            "mxfp4",
            f"dequantize {n}x{k} to bf16",
            {
                "ours": lambda: dequantize_mxfp4(blocks, scales),
                "compile": lambda: reference(blocks, scales, torch.bfloat16),
            },
            bytes=blocks.numel() + scales.numel() + 2 * n * k,
            bar=0.85,
        )
    ]


if __name__ == "__main__":
    main("mxfp4", cases)
