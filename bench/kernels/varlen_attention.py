"""Causal attention over packed documents, 32 and 8 heads of 128: python bench/kernels/varlen_attention.py [--dry-run].

Peers: every implementation that the wrapper can choose, and attention of one document as long as all together, which
computes more. FLOPs are those of visible pairs only, so shares of the ceiling compare across rows.
"""

import torch
from harness import Case, device, main
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.varlen_attention import varlen_attention

HEADS, KEYS, DIM = 32, 8, 128


def both_ways(op, leaves, upstream):
    """The op and the gradients of q, k and v."""
    return lambda: torch.autograd.grad(op(*leaves), leaves, upstream)


def whole(q, k, v):
    """torch's attention without boundaries, (T, H, D) in and out."""
    by_head = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def cases(small: bool) -> list[Case]:
    mixes = {"2 of 8": (2, 8)} if small else {"4 of 4,096": (4, 4096), "32 of 512": (32, 512)}
    heads, keys, dim = (4, 2, 16) if small else (HEADS, KEYS, DIM)
    backends = ("reference", "sdpa") if not torch.cuda.is_available() else ("flex", "sdpa")
    result = []
    for name, (documents, length) in mixes.items():
        tokens = documents * length
        bounds = torch.arange(0, tokens + 1, length, device=device(), dtype=torch.int32)

        def make(h, tokens=tokens):
            return torch.randn(tokens, h, dim, device=device(), dtype=torch.bfloat16, requires_grad=True)

        leaves = [make(heads), make(keys), make(keys)]
        upstream = torch.randn_like(leaves[0])

        def ours(q, k, v, bounds=bounds, length=length, **options):
            return varlen_attention(q, k, v, bounds, longest=length, **options)

        flops = 4 * heads * dim * documents * length * (length + 1) // 2
        ops = {"ours": ours}
        ops |= {b: lambda q, k, v, f=ours, b=b: f(q, k, v, backend=b) for b in backends}
        forward = {n: lambda f=f, x=leaves: f(*(t.detach() for t in x)) for n, f in ops.items()}
        training = {n: both_ways(f, leaves, upstream) for n, f in ops.items()}
        forward["one document"] = lambda x=leaves: whole(*(t.detach() for t in x))
        training["one document"] = both_ways(whole, leaves, upstream)
        result.append(Case("varlen", f"forward, {name}", forward, flops=flops))
        result.append(Case("varlen", f"forward+backward, {name}", training, flops=flops * 7 // 2))
    return result


if __name__ == "__main__":
    main("varlen_attention", cases)
