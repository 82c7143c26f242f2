"""NF4 dequantization against bitsandbytes: python bench/kernels/nf4.py [--dry-run]."""

import torch
from bitsandbytes import functional
from harness import Case, device, main

from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4


def cases(small: bool) -> list[Case]:
    n, k = (16, 128) if small else (4096, 14336)
    matrix = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4", blocksize=64)
    weight = NF4Weight.from_quant_state(packed, state)
    buffer = torch.empty(n, k + 64, device=device(), dtype=torch.bfloat16)
    return [
        Case(
            "nf4",
            f"dequantize {n}x{k} to bf16",
            {
                "ours": lambda: dequantize_nf4(weight),
                "ours, strided": lambda: dequantize_nf4(weight, out=buffer[:, :k]),
                "bitsandbytes": lambda: functional.dequantize_4bit(packed, state),
            },
            bytes=packed.numel() + weight.absmax.numel() + matrix.nbytes,
            bar=0.8,
        )
    ]


if __name__ == "__main__":
    main("nf4", cases)
