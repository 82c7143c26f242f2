"""Paged decode attention of an 8B layer: 32 query and 8 key heads of 128, 2,048 tokens a sequence, bfloat16.

Peer: torch's attention over a contiguous cache of exactly these tokens.
"""

import torch
from harness import Case, device, main
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.paged_attention import paged_attention, paged_attention_reference


def cases(small: bool) -> list[Case]:
    """Batches of 1, 32 and 128."""
    heads, keys, dim, tokens, page = (4, 2, 16, 32, 8) if small else (32, 8, 128, 2048, 64)

    def make(*shape):
        return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

    result = []
    for batch in (2,) if small else (1, 32, 128):
        pages = tokens // page
        q = make(batch, heads, dim)
        k, v = (make(batch * pages, page, keys, dim) for _ in range(2))
        table = torch.randperm(batch * pages, device=device()).view(batch, pages).int()
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device())
        dense = [make(batch, keys, tokens, dim) for _ in range(2)]
        found = {
            "ours": lambda q=q, k=k, v=v, t=table, n=lengths: paged_attention(q, k, v, t, n),
            "sdpa contiguous": lambda q=q, d=dense: scaled_dot_product_attention(q[:, :, None], *d, enable_gqa=True),
        }
        if batch == 1:
            found["reference"] = lambda q=q, k=k, v=v, t=table, n=lengths: paged_attention_reference(q, k, v, t, n)
        size = 2 * batch * tokens * keys * dim * 2
        result.append(Case("paged_attention", f"batch {batch}", found, bytes=size, reads_only=True))
    return result


if __name__ == "__main__":
    main("paged_attention", cases)
