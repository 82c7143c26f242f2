"""Attention of prompts over pages, 32 and 8 heads of 128: python bench/kernels/paged_prefill.py [--dry-run].

Whole prompts, and the last 512 tokens of long ones. Peer: torch's attention over contiguous keys and values of these
very sequences. FLOPs are those of visible pairs.
"""

import torch
from harness import Case, device, main
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.paged_prefill import make_tiles, paged_prefill

HEADS, KEYS, DIM, PAGE = 32, 8, 128, 64


def cases(small: bool) -> list[Case]:
    heads, keys, dim, page = (4, 2, 16, 4) if small else (HEADS, KEYS, DIM, PAGE)
    # sequences, tokens that are cached already, new tokens
    mixes = [(2, 4, 8)] if small else [(1, 0, 2048), (8, 0, 2048), (1, 0, 16384), (8, 7680, 512)]
    result = []
    for sequences, old, new in mixes:
        length = old + new
        pages = -(-length // page)

        def make(*shape):
            return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

        q = make(sequences * new, heads, dim)
        k, v = (make(sequences * pages, page, keys, dim) for _ in range(2))
        table = torch.randperm(sequences * pages, device=device()).view(sequences, pages).int()
        tiles = make_tiles([(new, old)] * sequences).to(device())
        dense_q, dense = make(sequences, heads, new, dim), [make(sequences, keys, length, dim) for _ in range(2)]

        def ours(q=q, k=k, v=v, table=table, tiles=tiles):
            return paged_prefill(q, k, v, table, tiles, scale=dim**-0.5)

        def peer(q=dense_q, dense=dense, old=old, new=new, length=length):
            if not old:
                return scaled_dot_product_attention(q, *dense, is_causal=True, enable_gqa=True)
            from torch.nn.attention.bias import causal_lower_right

            return scaled_dot_product_attention(q, *dense, attn_mask=causal_lower_right(new, length), enable_gqa=True)

        pairs = sequences * (new * old + new * (new + 1) // 2)
        name = f"{sequences} x {new}" + (f" after {old}" if old else "")
        result.append(
            Case("paged_prefill", name, {"ours": ours, "sdpa contiguous": peer}, flops=4 * heads * dim * pairs)
        )
    return result


if __name__ == "__main__":
    main("paged_prefill", cases)
