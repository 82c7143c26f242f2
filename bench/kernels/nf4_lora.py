"""4-bit linears with adapters of rank 32 for a decoding step, as graphs: python bench/kernels/nf4_lora.py [--dry-run].

Peers: our 4-bit products with torch's thin products beside them, with those of lora_rows, and bitsandbytes' products
with torch's.
"""

import torch
from bitsandbytes import functional, matmul_4bit
from harness import Case, device, main

from unsloth.kernels.lora_rows import lora_rows
from unsloth.kernels.nf4 import NF4Weight
from unsloth.kernels.nf4_lora import StackedAdapters, nf4_lora_linears
from unsloth.kernels.nf4_matmul import nf4_linear

GROUPS = {"q/k/v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate/up": ((14336, 14336), 4096)}
GROUPS["down"] = ((4096,), 14336)
RANK, SCALE = 32, 0.5


def graphed(step):
    """``step`` as a CUDA graph, or itself on the CPU."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kept = (graph, step)  # the graph reads tensors that only the step's closure holds
    return lambda: kept[0].replay()


def beside(x, products, adapters):
    """``products`` of x, and the adapters' part of each by torch."""
    outputs = []
    for i, product in enumerate(products):
        t = x @ adapters.a[RANK * i : RANK * (i + 1)].T
        outputs.append(torch.addmm(product(x), t, adapters.b[i].T, alpha=SCALE))
    return outputs


def rows_after(x, products, adapters):
    """``products`` of x, and the adapters' parts added by lora_rows."""
    outputs = [product(x) for product in products]
    lora_rows(x, adapters.a, adapters.b, outputs)
    return outputs


def cases(small: bool) -> list[Case]:
    result = []
    for name, (outs, k) in {"small": ((16, 24), 128)}.items() if small else GROUPS.items():
        quantized = [
            functional.quantize_4bit(
                torch.randn(n, k, device=device(), dtype=torch.bfloat16), compress_statistics=True, quant_type="nf4"
            )
            for n in outs
        ]
        weights = [NF4Weight.from_quant_state(*one) for one in quantized]
        a = torch.randn(RANK * len(outs), k, device=device(), dtype=torch.bfloat16)
        b = tuple(torch.randn(n, RANK, device=device(), dtype=torch.bfloat16) for n in outs)
        adapters = StackedAdapters(a, b, (SCALE,) * len(outs))
        ours = [lambda x, w=w: nf4_linear(x, w) for w in weights]
        theirs = [lambda x, p=p, s=s: matmul_4bit(x, p.t(), quant_state=s) for p, s in quantized]
        for rows in (1, 8, 32, 128):
            x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
            size = sum(w.packed.numel() + w.absmax.numel() for w in weights) + a.nbytes + sum(t.nbytes for t in b)
            found = {
                "ours": graphed(lambda x=x, w=weights, s=adapters: nf4_lora_linears(x, w, s)),
                "thin products beside": graphed(lambda x=x, p=ours, s=adapters: beside(x, p, s)),
                "lora_rows after": graphed(lambda x=x, p=ours, s=adapters: rows_after(x, p, s)),
                "bitsandbytes": graphed(lambda x=x, p=theirs, s=adapters: beside(x, p, s)),
            }
            result.append(Case("nf4_lora", f"{name}, {rows} rows", found, bytes=size, reads_only=True))
    return result


if __name__ == "__main__":
    main("nf4_lora", cases)
