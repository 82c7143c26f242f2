"""Linears with adapters of rank 32 for a decoding step, as graphs.

    python bench/kernels/decoding_linears.py [--dry-run]

With 4-bit weights all products of four layers one after the other, whose weights no cache holds, then those of one
input, where the peers are our 4-bit products with torch's thin products beside them, with those of lora_rows, and
bitsandbytes' products with torch's. With 16-bit weights the products of one input, of six layers so that no cache holds
them, with the gated unit after gate and up, beside torch's products.
"""

from functools import partial

import torch
from bitsandbytes import functional, matmul_4bit
from harness import Case, device, graphed, main

from unsloth.kernels.decoding_linears import StackedAdapters, decoding_gate, decoding_linears
from unsloth.kernels.lora_rows import lora_rows
from unsloth.kernels.nf4 import NF4Weight
from unsloth.kernels.nf4_matmul import nf4_linear
from unsloth.kernels.swiglu import swiglu

GROUPS = {"q/k/v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate/up": ((14336, 14336), 4096)}
GROUPS["down"] = ((4096,), 14336)
RANK, SCALE, LAYERS = 32, 0.5, 4


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


def random_group(outs, k):
    """Quantized matrices of one input as bitsandbytes gives them, ours of the same, and their adapters."""
    quantized = [
        functional.quantize_4bit(
            torch.randn(n, k, device=device(), dtype=torch.bfloat16), compress_statistics=True, quant_type="nf4"
        )
        for n in outs
    ]
    a = torch.randn(RANK * len(outs), k, device=device(), dtype=torch.bfloat16)
    b = tuple(torch.randn(n, RANK, device=device(), dtype=torch.bfloat16) for n in outs)
    weights = [NF4Weight.from_quant_state(*one) for one in quantized]
    return quantized, weights, StackedAdapters(a, b, (SCALE,) * len(outs))


def bytes_of(weights, adapters):
    """What a product reads."""
    packed = sum(w.packed.numel() + w.absmax.numel() for w in weights)
    return packed + adapters.a.nbytes + sum(b.nbytes for b in adapters.b)


def cases(small: bool) -> list[Case]:
    groups = {"q/k/v": ((16, 24), 128), "gate/up": ((16, 16), 128)} if small else GROUPS
    layers = [[(k, *random_group(outs, k)) for outs, k in groups.values()] for _ in range(LAYERS)]
    result = []
    for rows in (1, 8, 32, 128):
        xs = {k: torch.randn(rows, k, device=device(), dtype=torch.bfloat16) for _, k in groups.values()}

        def all_layers(xs=xs):
            return [decoding_linears(xs[k], w, adapters) for layer in layers for k, _, w, adapters in layer]

        size = sum(bytes_of(w, adapters) for layer in layers for _, _, w, adapters in layer)
        result.append(
            Case(
                "decoding_linears",
                f"{LAYERS} layers, {rows} rows",
                {"ours": graphed(all_layers)},
                size,
                reads_only=True,
            )
        )
    for name, (k, quantized, weights, adapters) in zip(groups, layers[0], strict=True):
        ours = [lambda x, w=w: nf4_linear(x, w) for w in weights]
        theirs = [lambda x, p=p, s=s: matmul_4bit(x, p.t(), quant_state=s) for p, s in quantized]
        for rows in (1, 8, 32, 128):
            x = torch.randn(rows, k, device=device(), dtype=torch.bfloat16)
            found = {
                "ours": graphed(lambda x=x, w=weights, s=adapters: decoding_linears(x, w, s)),
                "thin products beside": graphed(lambda x=x, p=ours, s=adapters: beside(x, p, s)),
                "lora_rows after": graphed(lambda x=x, p=ours, s=adapters: rows_after(x, p, s)),
                "bitsandbytes": graphed(lambda x=x, p=theirs, s=adapters: beside(x, p, s)),
            }
            size = bytes_of(weights, adapters)
            result.append(Case("decoding_linears", f"{name}, {rows} rows", found, bytes=size, reads_only=True))
    return result + [case for name, (outs, k) in groups.items() for case in dense_cases(name, outs, k)]


def dense_cases(name: str, outs: tuple[int, ...], k: int) -> list[Case]:
    """The products of one input with 16-bit weights, layer after layer."""
    make = partial(torch.randn, device=device(), dtype=torch.bfloat16)
    layers = []
    for _ in range(6):
        adapters = StackedAdapters(make(RANK * len(outs), k), tuple(make(n, RANK) for n in outs), (SCALE,) * len(outs))
        layers.append(([make(n, k) for n in outs], adapters))

    def ours(x, weights, adapters):
        if name == "gate/up":
            return decoding_gate(x, weights, adapters, None, "silu")
        return decoding_linears(x, weights, adapters)

    def torchs(x, weights, adapters):
        outputs = beside(x, [partial(torch.nn.functional.linear, weight=weight) for weight in weights], adapters)
        return swiglu(*outputs) if name == "gate/up" else outputs

    result = []
    for rows in (1, 8, 32, 128):
        x = make(rows, k)
        found = {
            "ours": graphed(lambda x=x: [ours(x, *layer) for layer in layers]),
            "torch's products": graphed(lambda x=x: [torchs(x, *layer) for layer in layers]),
        }
        size = sum(t.nbytes for weights, adapters in layers for t in (*weights, adapters.a, *adapters.b))
        result.append(
            Case("decoding_linears", f"6 layers' {name}, 16 bits, {rows} rows", found, bytes=size, reads_only=True)
        )
    return result


if __name__ == "__main__":
    main("decoding_linears", cases)
