"""Paged decode attention of an 8B layer: 32 query and 8 key heads of 128, 2,048 tokens a sequence, bfloat16.

Peer: torch's attention over a contiguous cache of exactly these tokens.
"""

import torch
from harness import Case, main
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.paged_attention import paged_attention, paged_attention_reference

HEADS, KEYS, DIM, TOKENS, PAGE = 32, 8, 128, 2048, 64


def build() -> list[Case]:
    """Batches of 1, 32 and 128."""
    cases = []
    for batch in (1, 32, 128):
        pages = TOKENS // PAGE
        q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch * pages, PAGE, KEYS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        table = torch.randperm(batch * pages, device="cuda").view(batch, pages).int()
        lengths = torch.full((batch,), TOKENS, dtype=torch.int32, device="cuda")
        dense = [torch.randn(batch, KEYS, TOKENS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        found = {
            "ours": lambda q=q, k=k, v=v, t=table, n=lengths: paged_attention(q, k, v, t, n),
            "sdpa contiguous": lambda q=q, d=dense: scaled_dot_product_attention(q[:, :, None], *d, enable_gqa=True),
        }
        if batch == 1:
            found["reference"] = lambda q=q, k=k, v=v, t=table, n=lengths: paged_attention_reference(q, k, v, t, n)
        cases.append(Case("paged_attention", f"batch {batch}", found, bytes=2 * batch * TOKENS * KEYS * DIM * 2))
    return cases


if __name__ == "__main__":
    main("paged_attention", build)
