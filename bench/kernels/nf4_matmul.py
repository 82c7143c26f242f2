"""Fused NF4 products against bitsandbytes: python bench/kernels/nf4_matmul.py [--dry-run].

Of one row also what reading the words alone takes, the floor of any such product: alone, a launch's own 4 us count in
both, so twelve in a graph say more, and gate and up in one launch are what a decoding step asks for.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes import functional, matmul_4bit
from harness import Case, device, graphed, main

from unsloth.kernels.decoding_linears import decoding_linears
from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4
from unsloth.kernels.nf4_matmul import nf4_linear

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]  # gate/up, down, q/o, k/v of an 8B model


@triton.jit
def read_kernel(words, sums, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(words + at, at < size, other=0), 0))


def read(packed: torch.Tensor) -> None:
    """The words of a matrix, added up."""
    words = packed.view(-1).view(torch.int32)
    sums = torch.empty(triton.cdiv(len(words), 2048), dtype=torch.int32, device=words.device)
    read_kernel[(len(sums),)](words, sums, len(words), BLOCK=2048, num_warps=4)


def cases(small: bool) -> list[Case]:
    result = []
    for n, k in [(16, 128)] if small else SHAPES:
        matrix = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
        packed, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4", blocksize=64)
        weight = NF4Weight.from_quant_state(packed, state)
        large = n * k > 2**25
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if large and not small else (1, 4, 32):
            x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
            providers = {
                "ours": lambda x=x, weight=weight: nf4_linear(x, weight),
                "dequantize first": lambda x=x, weight=weight: x @ dequantize_nf4(weight).T,
                "bitsandbytes": lambda x=x, p=packed, s=state: matmul_4bit(x, p.t(), quant_state=s),
            }
            if rows == 1:
                providers["words read alone"] = lambda p=packed: read(p)
            result.append(
                Case(
                    "nf4_matmul",
                    f"{rows} rows x {n}x{k} bf16",
                    providers,
                    bytes=packed.numel() + weight.absmax.numel() + x.nbytes + 2 * rows * n,
                    flops=2 * rows * n * k,
                    bar=0.7 if rows == 1 and large else 0.0,
                    reads_only=True,
                )
            )
    return result + [case for rows in (1, 16, 32, 128) for case in in_a_graph(rows, small)]


def in_a_graph(rows: int, small: bool) -> list[Case]:
    """Twelve matrices one after the other in a graph, as in a decoding step: no cache holds them; then in pairs."""
    n, k = (16, 128) if small else SHAPES[0]
    x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
    weights = []
    for _ in range(12):
        matrix = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
        weights.append(
            NF4Weight.from_quant_state(*functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"))
        )
    size = sum(weight.packed.numel() + weight.absmax.nbytes for weight in weights)
    providers = {"ours": graphed(lambda: [nf4_linear(x, weight) for weight in weights])}
    if rows == 1:
        providers["words read alone"] = graphed(lambda: [read(weight.packed) for weight in weights])
    pairs = [weights[i : i + 2] for i in range(0, 12, 2)]
    together = {"ours": graphed(lambda: [decoding_linears(x, pair, None) for pair in pairs])}
    bar = 0.7 if rows == 1 else 0.0
    return [
        Case("nf4_matmul", f"12 in a graph, {rows} rows x {n}x{k}", providers, size, bar=bar, reads_only=True),
        Case("nf4_matmul", f"6 pairs in a graph, {rows} rows x {n}x{k}", together, size, bar=bar, reads_only=True),
    ]


if __name__ == "__main__":
    main("nf4_matmul", cases)
