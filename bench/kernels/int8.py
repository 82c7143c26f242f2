"""int8 dequantization against bitsandbytes and torch.compile: python bench/kernels/int8.py [--dry-run]."""

import torch
from bitsandbytes import functional
from harness import Case, compiled, device, main

from unsloth.kernels.int8 import dequantize_int8, dequantize_int8_reference


def cases(small: bool) -> list[Case]:
    n, k = (16, 128) if small else (4096, 14336)
    matrix = torch.randn(n, k, device=device(), dtype=torch.float16)
    q, scb, _ = functional.int8_vectorwise_quant(matrix)
    scale = scb / 127
    reference = compiled(dequantize_int8_reference)
    return [
        Case(
            "int8",
            f"dequantize {n}x{k} to bf16",
            {
                "ours": lambda: dequantize_int8(q, scale),
                "compile": lambda: reference(q, scale[:, None], torch.bfloat16),
                "bitsandbytes, to float32": lambda: functional.int8_vectorwise_dequant(q, scb),
            },
            bytes=q.numel() + matrix.nbytes,
            bar=0.85,
        )
    ]


if __name__ == "__main__":
    main("int8", cases)
