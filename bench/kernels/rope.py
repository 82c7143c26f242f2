"""RoPE against torch.compile and Liger: python bench/kernels/rope.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main, peer

from unsloth.kernels.rope import rope, rope_reference, rope_tables


def cases(small: bool) -> list[Case]:
    b, t, heads, k_heads, d = (1, 4, 2, 1, 16) if small else (4, 2048, 32, 8, 128)
    q, k = (torch.randn(b, t, n, d, device=device(), dtype=torch.bfloat16).transpose(1, 2) for n in (heads, k_heads))
    q.requires_grad_()
    k.requires_grad_()
    inv_freq = 500000.0 ** (-torch.arange(0, d, 2, device=device()).float() / d)
    positions = torch.arange(t, device=device())
    cos, sin = rope_tables(inv_freq, positions)
    wide = [torch.cat((x, x), -1)[None].bfloat16() for x in (cos, sin)]  # as transformers passes them
    size, name = q.nbytes + k.nbytes, f"{b}x{t} {heads}+{k_heads}x{d} bf16"

    def formula(q, k, cos, sin):
        return rope_reference(q, cos, sin, d), rope_reference(k, cos, sin, d)

    def ours(q, k, **options):
        return rope(q, k, cos, sin, rotary_dim=d, **options)

    reference = compiled(formula)

    def liger(fn):
        def build():
            from liger_kernel.ops.rope import LigerRopeFunction

            return {"liger": fn(lambda q, k: LigerRopeFunction.apply(q, k, *wide))}

        return peer(build)

    still = q.detach().clone(), k.detach().clone()
    table = cos[None].expand(b, t, d // 2), sin[None].expand(b, t, d // 2)
    return [
        Case(
            "rope",
            f"forward {name}",
            {"ours": lambda: ours(q, k), "compile": lambda: reference(q, k, *table)}
            | liger(lambda fn: lambda: fn(*still)),
            bytes=2 * size,
            bar=0.85,
        ),
        Case(
            "rope",
            f"in place {name}",
            {
                "ours": lambda: ours(*still, inplace=True),
                "ours, packed": lambda: ours(*still, inplace=True, positions=positions),
                "ours, wide bf16": lambda: rope(*still, *wide, inplace=True),
                "ours, interleaved": lambda: ours(*still, inplace=True, interleaved=True),
            },
            bytes=2 * size,
            bar=0.85,
        ),
        Case(
            "rope",
            f"backward {name}",
            {"ours": backward(ours, (q, k)), "compile": backward(reference, (q, k), *table)}
            | liger(lambda fn: backward(lambda q, k: fn(q * 1, k * 1), (q, k))),
            bytes=2 * size,
            bar=0.85,
        ),
    ]


if __name__ == "__main__":
    main("rope", cases)
