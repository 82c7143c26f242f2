"""Fused NF4 products against bitsandbytes: python bench/kernels/nf4_matmul.py [--dry-run]."""

import torch
from bitsandbytes import functional, matmul_4bit
from harness import Case, device, graphed, main

from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4
from unsloth.kernels.nf4_matmul import nf4_linear

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]  # gate/up, down, q/o, k/v of an 8B model


def cases(small: bool) -> list[Case]:
    result = []
    for n, k in [(16, 128)] if small else SHAPES:
        matrix = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
        packed, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4", blocksize=64)
        weight = NF4Weight.from_quant_state(packed, state)
        large = n * k > 2**25
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if large and not small else (1, 4, 32):
            x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
            result.append(
                Case(
                    "nf4_matmul",
                    f"{rows} rows x {n}x{k} bf16",
                    {
                        "ours": lambda x=x, weight=weight: nf4_linear(x, weight),
                        "dequantize first": lambda x=x, weight=weight: x @ dequantize_nf4(weight).T,
                        "bitsandbytes": lambda x=x, p=packed, s=state: matmul_4bit(x, p.t(), quant_state=s),
                    },
                    bytes=packed.numel() + weight.absmax.numel() + x.nbytes + 2 * rows * n,
                    flops=2 * rows * n * k,
                    bar=0.7 if rows == 1 and large else 0.0,
                    reads_only=True,
                )
            )
    return result + [in_a_graph(rows, small) for rows in (1, 16, 32, 128)]


def in_a_graph(rows: int, small: bool) -> Case:
    """Twelve matrices one after the other in a graph, as in a decoding step: no cache holds them."""
    n, k = (16, 128) if small else SHAPES[0]
    x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
    weights = []
    for _ in range(12):
        matrix = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
        weights.append(
            NF4Weight.from_quant_state(*functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"))
        )
    size = sum(weight.packed.numel() + weight.absmax.nbytes for weight in weights)
    step = graphed(lambda: [nf4_linear(x, weight) for weight in weights])
    return Case("nf4_matmul", f"12 in a graph, {rows} rows x {n}x{k}", {"ours": step}, size, reads_only=True)


if __name__ == "__main__":
    main("nf4_matmul", cases)
